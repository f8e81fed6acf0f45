/* Formatted text on the serial port. */
#pragma once

/* A small printf: %s %c %u %x %lu %lx %%, with an optional 0 and width ("%016lx").
 * A whole call is formatted first and sent in one piece; what exceeds 160 bytes is cut.
 * "\n" becomes CR LF, because the terminal at the other end may be in raw mode. */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);
