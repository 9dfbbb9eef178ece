/* One attack on the host for each word, as a command of a build would try it. Prints one line,
 * "attack WORD: " and what came of it: the name of the error, or SUCCEEDED. Its exit code is 0,
 * so that one command can try many. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* keyctl(2), userfaultfd(2), and a flag of no namespace: what the C library has no names for. */
#define SESSION_KEYRING (-3)
#define GET_KEYRING_ID 0
#define USER_MODE_ONLY 1
#define NO_NAMESPACE 1

static const char *word;

static int tell(long result) {
    printf("attack %s: %s\n", word, result < 0 ? strerrorname_np(errno) : "SUCCEEDED");
    return 0;
}

/* What was had before the kernel said no. */
static int tell_after(long count, const char *unit) {
    const char *error = strerrorname_np(errno);
    printf("attack %s: %s after %ld %s\n", word, error, count, unit);
    return 0;
}

static long opened(const char *path, int flags) {
    int file = open(path, flags | O_CLOEXEC);
    if (file >= 0) close(file);
    return file;
}

static long trace(void) {
    pid_t child = fork();
    if (child == 0) {
        pause();
        _exit(0);
    }
    long result = ptrace(PTRACE_ATTACH, child, 0, 0);
    int error = errno;
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    errno = error;
    return result;
}

static long read_memory(void) {
    char byte;
    struct iovec here = {&byte, 1}, there = {(void *)0x400000, 1};
    return process_vm_readv(1, &here, 1, &there, 1, 0);
}

static long clone_namespaces(void) {
    long child = syscall(SYS_clone, CLONE_NEWUSER | CLONE_NEWNS | SIGCHLD, 0, 0, 0, 0);
    if (child == 0) _exit(0);
    return child;
}

/* By its number a file of the file system below is reached past every mount. */
static long by_handle(void) {
    struct { struct file_handle head; unsigned char number[8]; } handle = {.number = {2}};
    handle.head.handle_bytes = 8;
    handle.head.handle_type = 1;
    int here = open("/", O_RDONLY | O_DIRECTORY);
    return open_by_handle_at(here, &handle.head, O_RDONLY);
}

static long load_program(void) {
    union bpf_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    return syscall(SYS_bpf, BPF_PROG_LOAD, &attributes, sizeof attributes);
}

/* chroot(2): whoever stands outside of its root walks up to the root of its mounts. */
static long climb(const char *wanted) {
    mkdir("/cage", 0700);
    if (chroot("/cage") < 0) return -1;
    for (int turn = 0; turn < 64; turn++) {
        if (chdir("..") < 0) return -1;
    }
    if (chroot(".") < 0) return -1;
    return opened(wanted, O_RDONLY);
}

static long reach(const char *address, const char *port) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
    struct timeval patience = {.tv_sec = 2};
    int is_v4 = inet_pton(AF_INET, address, &v4.sin_addr) == 1;
    if (!is_v4) inet_pton(AF_INET6, address, &v6.sin6_addr);
    int wire = socket(is_v4 ? AF_INET : AF_INET6, SOCK_STREAM, 0);
    if (wire < 0) return -1;
    setsockopt(wire, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return is_v4 ? connect(wire, (struct sockaddr *)&v4, sizeof v4)
                 : connect(wire, (struct sockaddr *)&v6, sizeof v6);
}

/* Asks the commands' own way out for a connection; tells its status. */
static int through_proxy(const char *place) {
    struct sockaddr_in door = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {.tv_sec = 30};
    const char *proxy = getenv("http_proxy"), *port = proxy ? strrchr(proxy, ':') : NULL;
    char words[512];
    if (port == NULL) {
        errno = ENOPROTOOPT;
        return tell(-1);
    }
    door.sin_port = htons(atoi(port + 1));
    int wire = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(wire, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(wire, (struct sockaddr *)&door, sizeof door) < 0) return tell(-1);
    int length = snprintf(words, sizeof words, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", place, place);
    if (write(wire, words, length) != length) return tell(-1);
    /* "HTTP/1.1 403" */
    length = recv(wire, words, 12, MSG_WAITALL);
    if (length < 12) return tell(-1);
    printf("attack proxy: %.3s\n", words + 9);
    close(wire);
    return 0;
}

static int files(void) {
    long count = 0;
    while (open("/bin/attack", O_RDONLY) >= 0) count++;
    return tell_after(count, "files");
}

static int inodes(void) {
    char name[64];
    long count = 0;
    mkdir("/srv/inodes", 0700);
    for (;; count++) {
        snprintf(name, sizeof name, "/srv/inodes/%ld", count);
        int file = open(name, O_CREAT | O_WRONLY, 0600);
        if (file < 0) return tell_after(count, "inodes");
        close(file);
    }
}

static int fill(const char *path) {
    static char noise[1 << 20];
    memset(noise, 'x', sizeof noise);
    int file = open(path, O_CREAT | O_WRONLY, 0600);
    long bytes = 0, more;
    if (file < 0) return tell(-1);
    while ((more = write(file, noise, sizeof noise)) > 0) bytes += more;
    return tell_after(bytes >> 10, "KiB");
}

/* Children that no signal but one ends, each in a session of its own. */
static void stay(void) {
    setsid();
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
}

static int forks(void) {
    for (long count = 0;; count++) {
        pid_t child = fork();
        if (child < 0) return tell_after(count, "processes");
        if (child == 0) {
            stay();
            for (;;) pause();
        }
    }
}

/* Never ends: each tries to be two. */
static void storm(void) {
    printf("attack storm: begins\n");
    fflush(stdout);
    stay();
    for (;;) fork();
}

static int memory(void) {
    printf("attack memory: begins\n");
    fflush(stdout);
    for (;;) {
        char *more = malloc(1 << 20);
        if (more == NULL) return tell(-1);
        memset(more, 1, 1 << 20);
    }
}

static int flood(void) {
    for (long count = 0; count < 1 << 20; count++) {
        printf("attack flood: line %060ld\n", count);
    }
    return 0;
}

/* A terminal that shows this would be cleared, renamed, and lied to. */
static int steer(void) {
    printf("\033[2J\033]0;attack renamed\007attack steer: \033[31mred\033[0m\033]8;;http://x\033\\\n");
    printf("attack steer: over\rattack steer: written \xe2\x80\xae reversed\n");
    return 0;
}

/* What the kernel says of this process. */
static int status(const char *field) {
    char line[256];
    size_t length = strlen(field);
    FILE *file = fopen("/proc/self/status", "r");
    if (file == NULL) return tell(-1);
    while (fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, field, length) || line[length] != ':') continue;
        printf("attack status: %s", line + length + 2);
        return 0;
    }
    errno = ENODATA;
    return tell(-1);
}

static int namespace(const char *kind) {
    char path[64], name[64];
    snprintf(path, sizeof path, "/proc/self/ns/%s", kind);
    ssize_t length = readlink(path, name, sizeof name - 1);
    if (length < 0) return tell(-1);
    printf("attack namespace: %.*s\n", (int)length, name);
    return 0;
}

static int is_read_only(const char *path) {
    struct statvfs found;
    if (statvfs(path, &found) < 0) return tell(-1);
    printf("attack written-to: %s\n", found.f_flag & ST_RDONLY ? "EROFS" : "SUCCEEDED");
    return 0;
}

static int as_nobody(const char *program) {
    if (setgid(65534) < 0 || setuid(65534) < 0) return tell(-1);
    execl(program, program, "who", NULL);
    return tell(-1);
}

static int with_words(int count, char **words) {
    if (count < 3) return -1;
    if (!strcmp(word, "read")) return tell(opened(words[2], O_RDONLY));
    if (!strcmp(word, "write")) return tell(opened(words[2], O_WRONLY));
    if (!strcmp(word, "climb")) return tell(climb(words[2]));
    if (!strcmp(word, "fill")) return fill(words[2]);
    if (!strcmp(word, "proxy")) return through_proxy(words[2]);
    if (!strcmp(word, "status")) return status(words[2]);
    if (!strcmp(word, "namespace")) return namespace(words[2]);
    if (!strcmp(word, "written-to")) return is_read_only(words[2]);
    if (!strcmp(word, "nobody")) return as_nobody(words[2]);
    if (!strcmp(word, "connect") && count > 3) return tell(reach(words[2], words[3]));
    return -1;
}

static long called(void) {
    int here = 0;
    if (!strcmp(word, "ptrace")) return trace();
    if (!strcmp(word, "memory-of-others")) return read_memory();
    if (!strcmp(word, "mount")) return mount("none", "/tmp", "tmpfs", 0, NULL);
    if (!strcmp(word, "mount-cgroup")) return mount("none", "/tmp", "cgroup2", 0, NULL);
    if (!strcmp(word, "mount-anew")) return syscall(SYS_fsopen, "tmpfs", 0);
    /* Nobody needs a right for it. */
    if (!strcmp(word, "open-tree")) return syscall(SYS_open_tree, AT_FDCWD, "/", 0);
    /* The kernel would find fault with these before it asks for rights (EFAULT, EBADF, EINVAL): who
     * is told EPERM has met the filter. */
    if (!strcmp(word, "senseless-mount")) return mount("none", "/tmp", (char *)1, 0, NULL);
    if (!strcmp(word, "senseless-setns")) return setns(-1, 0);
    if (!strcmp(word, "senseless-unshare")) return unshare(NO_NAMESPACE);
    if (!strcmp(word, "pivot")) return syscall(SYS_pivot_root, "/tmp", "/tmp");
    if (!strcmp(word, "setns")) {
        here = open("/proc/1/ns/mnt", O_RDONLY);
        return setns(here, 0);
    }
    if (!strcmp(word, "unshare")) return unshare(CLONE_NEWUSER);
    if (!strcmp(word, "unshare-cgroup")) return unshare(CLONE_NEWCGROUP);
    if (!strcmp(word, "clone")) return clone_namespaces();
    if (!strcmp(word, "keyctl")) return syscall(SYS_keyctl, GET_KEYRING_ID, SESSION_KEYRING, 1);
    if (!strcmp(word, "add-key"))
        return syscall(SYS_add_key, "user", "a", "b", 1, SESSION_KEYRING);
    if (!strcmp(word, "bpf")) return load_program();
    if (!strcmp(word, "perf")) return syscall(SYS_perf_event_open, NULL, 0, -1, -1, 0);
    if (!strcmp(word, "userfault")) return syscall(SYS_userfaultfd, USER_MODE_ONLY);
    if (!strcmp(word, "io-uring")) return syscall(SYS_io_uring_setup, 1, NULL);
    if (!strcmp(word, "handle")) return by_handle();
    if (!strcmp(word, "module")) return syscall(SYS_init_module, NULL, 0, "");
    if (!strcmp(word, "reboot")) return syscall(SYS_reboot, 0, 0, 0, NULL);
    if (!strcmp(word, "device")) return mknod("/srv/made", S_IFBLK | 0600, makedev(254, 0));
    if (!strcmp(word, "raw-socket")) return socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
    if (!strcmp(word, "packet-socket")) return socket(AF_PACKET, SOCK_RAW, 0);
    if (!strcmp(word, "vsock")) return socket(AF_VSOCK, SOCK_STREAM, 0);
    if (!strcmp(word, "kill")) return kill(-1, SIGKILL);
    errno = EINVAL;
    return -1;
}

int main(int count, char **words) {
    word = count > 1 ? words[1] : "";
    if (!strcmp(word, "who")) {
        printf("attack who: user %d\n", geteuid());
        return 0;
    }
    if (!strcmp(word, "files")) return files();
    if (!strcmp(word, "inodes")) return inodes();
    if (!strcmp(word, "forks")) return forks();
    if (!strcmp(word, "storm")) storm();
    if (!strcmp(word, "memory")) return memory();
    if (!strcmp(word, "flood")) return flood();
    if (!strcmp(word, "steer")) return steer();
    int done = with_words(count, words);
    return done >= 0 ? done : tell(called());
}
