/* macOS's fclonefileat(2), with its signature, as far as one file goes: it copies where the real one shares. It fails
 * as the real one does: where the name is taken, and with the number in CLONE_ERRNO where that is set. */

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define DARWIN_AT_FDCWD (-2)
#define CLONE_NOOWNERCOPY 0x0002

int fclonefileat(int source, int directory, const char *name, uint32_t flags);

int fclonefileat(int source, int directory, const char *name, uint32_t flags)
{
    const char *refusal = getenv("CLONE_ERRNO");
    char buffer[65536];
    struct stat status;
    off_t at = 0;
    ssize_t count;
    int clone;

    if (refusal != NULL) {
        errno = atoi(refusal);
        return -1;
    }
    if (directory != DARWIN_AT_FDCWD || flags != CLONE_NOOWNERCOPY || fstat(source, &status) != 0) {
        errno = EINVAL;
        return -1;
    }
    clone = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (clone < 0)
        return -1;
    while ((count = pread(source, buffer, sizeof(buffer), at)) > 0) {
        if (pwrite(clone, buffer, (size_t)count, at) != count) {
            count = -1;
            break;
        }
        at += count;
    }
    if (count < 0 || fchmod(clone, status.st_mode & 0777) != 0) {
        int error = errno;
        close(clone);
        unlink(name);
        errno = error;
        return -1;
    }
    return close(clone);
}
