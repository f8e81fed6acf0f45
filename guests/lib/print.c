/* Format into a buffer on the stack, then send it in one piece. */
#include "print.h"

#include <stdarg.h>
#include <stdint.h>

#include "serial.h"

#define LINE_SIZE 160

struct line {
    char text[LINE_SIZE];
    unsigned length;
};

static void put(struct line *line, char c)
{
    if (line->length < LINE_SIZE)
        line->text[line->length++] = c;
}

static void put_number(struct line *line, uint64_t value, unsigned base, unsigned width, char pad)
{
    char digits[20]; /* 2^64 - 1 has 20 decimal digits */
    unsigned count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    for (; width > count; width--)
        put(line, pad);
    while (count)
        put(line, digits[--count]);
}

void print(const char *format, ...)
{
    struct line line;
    line.length = 0; /* not "= {0}": that would clear 160 bytes for nothing */
    va_list arguments;
    va_start(arguments, format);
    for (; *format; format++) {
        if (*format == '\n')
            put(&line, '\r');
        if (*format != '%') {
            put(&line, *format);
            continue;
        }
        format++;
        char pad = ' ';
        if (*format == '0') {
            pad = '0';
            format++;
        }
        unsigned width = 0;
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + (unsigned)(*format - '0');
        int is_long = *format == 'l';
        format += is_long;
        switch (*format) {
        case 'u':
        case 'x':
            put_number(&line,
                       is_long ? va_arg(arguments, uint64_t) : va_arg(arguments, unsigned),
                       *format == 'u' ? 10 : 16, width, pad);
            break;
        case 's':
            for (const char *s = va_arg(arguments, const char *); *s; s++)
                put(&line, *s);
            break;
        case 'c':
            put(&line, (char)va_arg(arguments, int));
            break;
        default: /* "%%", and a mistake shows itself */
            put(&line, *format);
            break;
        }
    }
    va_end(arguments);
    serial_write(line.text, line.length);
}
