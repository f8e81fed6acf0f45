/* Options from the Multiboot command line ("pages=512 rounds=0"). */
#include "multiboot.h"

/* Loaders differ: some put the image's file name before the arguments, some do not. Looking for
 * "name=" at the start of any word works with both. */
static const char *after_name(const char *line, const char *name)
{
    bool word_start = true;
    for (; *line; line++) {
        if (word_start) {
            const char *at = line;
            const char *want = name;
            while (*want && *at == *want) {
                at++;
                want++;
            }
            if (!*want && *at == '=')
                return at + 1;
        }
        word_start = *line == ' ';
    }
    return 0;
}

const char *multiboot_text(const struct multiboot_info *info, const char *name)
{
    if (!(info->flags & MULTIBOOT_HAS_COMMAND_LINE))
        return 0;
    return after_name((const char *)(uintptr_t)info->command_line, name);
}

bool multiboot_option(const struct multiboot_info *info, const char *name, uint64_t otherwise,
                      uint64_t *value)
{
    const char *digits = multiboot_text(info, name);
    if (!digits) {
        *value = otherwise;
        return true;
    }
    uint64_t number = 0;
    unsigned count = 0;
    /* Nine digits are enough for every option and cannot overflow anything computed from them. */
    for (; *digits >= '0' && *digits <= '9' && count < 10; digits++, count++)
        number = number * 10 + (uint64_t)(*digits - '0');
    if (count == 0 || count > 9 || (*digits && *digits != ' '))
        return false;
    *value = number;
    return true;
}
