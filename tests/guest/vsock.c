/* vsock PORT            standard input to the host's vsock port, and what comes back to standard output
 * vsock - ADDRESS:PORT  the same; as socat is called in guests
 * vsock -c PORT         what one recv() of 2048 bytes brings, as far as its first NUL
 * Tries for 10 s to connect: a hypervisor may listen a moment after the guest has begun to run. */
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { COMMAND_MAX = 2048, TRIES = 100, BETWEEN_US = 100000, LINGER_S = 2 };

static int dial(unsigned port)
{
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};

    for (int i = 0; i < TRIES; i++) {
        int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if (fd < 0)
            break;
        if (connect(fd, (struct sockaddr *)&host, sizeof host) == 0)
            return fd;
        close(fd);
        if (errno == ENODEV)
            break;
        usleep(BETWEEN_US);
    }
    perror("vsock");
    exit(1);
}

/* Returns whether there may be more. */
static int copy(int from, int to)
{
    char buffer[8192]; /* what socat has; vhost-device-vsock loses packets of 64 KiB */
    ssize_t size = read(from, buffer, sizeof buffer), done = 0;

    while (done < size) {
        ssize_t n = write(to, buffer + done, size - done);
        if (n < 0)
            return 0;
        done += n;
    }
    return size > 0;
}

static int fetch(int host)
{
    char command[COMMAND_MAX + 1];
    ssize_t size = recv(host, command, COMMAND_MAX, 0);

    if (size <= 0)
        return 1;
    command[size] = '\0';
    return fputs(command, stdout) == EOF || fflush(stdout) == EOF;
}

int main(int argc, char **argv)
{
    const char *last = argv[argc - 1], *colon = strrchr(last, ':');
    int host = dial(strtoul(colon ? colon + 1 : last, NULL, 10));
    struct pollfd ends[] = {{.fd = 0, .events = POLLIN}, {.fd = host, .events = POLLIN}};
    struct linger linger = {.l_onoff = 1, .l_linger = LINGER_S};

    if (argc > 2 && strcmp(argv[1], "-c") == 0)
        return fetch(host);
    while (poll(ends, 2, -1) > 0) {
        if (ends[0].revents && !copy(0, host))
            break;
        if (ends[1].revents && !copy(host, 1))
            break;
    }
    /* the guest may power off when this ends: until the host has taken it all and closed its end too */
    setsockopt(host, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    close(host);
    return 0;
}
