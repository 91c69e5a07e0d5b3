/* A wall clock that is off by as many seconds as the file $STEPPED_CLOCK says, for programs that are
 * started with this library in LD_PRELOAD. What measures spans of time stays right: steady clocks
 * are not touched. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static int real(clockid_t clock, struct timespec *now) {
    static int (*next)(clockid_t, struct timespec *);
    if (!next)
        next = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    return next(clock, now);
}

/* Read anew five times a second. */
static long offset(void) {
    static long known, read_at = -1;
    struct timespec steady;
    real(CLOCK_MONOTONIC, &steady);
    long tick = steady.tv_sec * 5 + steady.tv_nsec / 200000000;
    const char *path = getenv("STEPPED_CLOCK");
    if (path && tick != read_at) {
        FILE *file = fopen(path, "r");
        long told;
        if (file) {
            if (fscanf(file, "%ld", &told) == 1)
                known = told;
            fclose(file);
        }
        read_at = tick;
    }
    return known;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset();
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
