/* vsock-echo PORT  answers each connection to the guest's vsock port with what it sends; returns when it listens */
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 16 };

static void answer(int host)
{
    char buffer[65536];
    ssize_t size;

    while ((size = read(host, buffer, sizeof buffer)) > 0)
        for (ssize_t done = 0, n; done < size; done += n)
            if ((n = write(host, buffer + done, size - done)) < 0)
                return;
}

int main(int argc, char **argv)
{
    struct sockaddr_vm guest = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);

    guest.svm_port = strtoul(argv[argc - 1], NULL, 10);
    signal(SIGCHLD, SIG_IGN);
    if (bind(listener, (struct sockaddr *)&guest, sizeof guest) || listen(listener, BACKLOG) || daemon(0, 0)) {
        perror("vsock-echo");
        return 1;
    }
    for (;;) {
        int host = accept(listener, NULL, NULL);
        if (host >= 0 && fork() == 0) {
            answer(host);
            return 0;
        }
        close(host);
    }
}
