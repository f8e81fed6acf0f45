/* What busybox lacks: vsock streams from the command line.
 *
 *   host_streams connect PORT    connect to the host; send a line, then check what comes, which must be the line and
 *                                SIZE bytes; send these back, half-close, wait for the end
 *   host_streams listen PORT     accept one stream, send back what comes until it ends, half-close
 */
#include <linux/types.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SIZE 70000

static int fail(const char *what)
{
	printf("%s: %s\n", what, strerror(errno));
	return 1;
}

static int write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t done = write(fd, data, size);
		if (done <= 0)
			return -1;
		data += done;
		size -= done;
	}
	return 0;
}

static size_t read_all(int fd, char *data, size_t size)
{
	size_t got = 0;
	while (got < size) {
		ssize_t n = read(fd, data + got, size - got);
		if (n <= 0)
			break;
		got += n;
	}
	return got;
}

static char buffer[SIZE + 1];

static int echo_from_host(unsigned int port)
{
	static const char line[] = "hello host\n";
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return fail("connect");
	if (write_all(fd, line, strlen(line)))
		return fail("write");
	if (read_all(fd, buffer, strlen(line)) != strlen(line) || memcmp(buffer, line, strlen(line)))
		return fail("the line");
	if (read_all(fd, buffer, SIZE) != SIZE)
		return fail("the bytes");
	if (write_all(fd, buffer, SIZE) || shutdown(fd, SHUT_WR))
		return fail("write back");
	if (read_all(fd, buffer, sizeof(buffer)) != 0)
		return fail("the end");
	printf("connected: %d bytes each way\n", SIZE);
	return close(fd);
}

static int echo_to_host(unsigned int port)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0), fd;
	size_t total = 0;
	ssize_t n;

	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 1))
		return fail("listen");
	fd = accept(listener, NULL, NULL);
	if (fd < 0)
		return fail("accept");
	while ((n = read(fd, buffer, 4096)) > 0) {
		if (write_all(fd, buffer, n))
			return fail("write");
		total += n;
	}
	if (n < 0 || shutdown(fd, SHUT_WR))
		return fail("the end");
	printf("accepted: %zu bytes each way\n", total);
	return close(fd) | close(listener);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	return (strcmp(argv[1], "connect") ? echo_to_host : echo_from_host)(atoi(argv[2]));
}
