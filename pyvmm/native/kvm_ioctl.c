/* ioctl() as cffi can call it without varargs: a pointer or a number, the answer or -errno. */

#include "core.h"

#include <errno.h>

long pv_ioctl(int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);
	return result < 0 ? -errno : result;
}

long pv_ioctl_number(int fd, unsigned long request, unsigned long argument)
{
	int result = ioctl(fd, request, argument);
	return result < 0 ? -errno : result;
}
