#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

typedef struct job {
    task function;
    void *arguments;
    int64_t next, count, left; /* tasks: the next to hand out, all, not yet ended */
    struct job *after;
} job;

struct pool {
    pthread_mutex_t lock; /* guards everything below and the counters of queued jobs */
    pthread_cond_t work, done;
    job *first, *last; /* jobs with tasks still to hand out; each lies on the stack of its pool_run */
    int stop, num_threads, niceness;
    pthread_t threads[];
};

/* Rounding and denormals as IEEE 754 has them: a thread inherits these modes from the one that starts it, and torch
 * may have told that one to flush denormals. */
static void use_ieee_modes(void) {
#if defined(__x86_64__)
    _mm_setcsr(0x1f80);
#elif defined(__aarch64__)
    uint64_t modes = 0;
    __asm__ volatile("msr fpcr, %0" : : "r"(modes));
#endif
}

static void *serve(void *argument) {
    pool *self = argument;
    use_ieee_modes();
#if defined(__linux__)
    if (self->niceness) (void)!nice(self->niceness); /* there it is a thread's own */
#endif
    pthread_mutex_lock(&self->lock);
    for (;;) {
        while (!self->first && !self->stop) pthread_cond_wait(&self->work, &self->lock);
        job *current = self->first;
        if (!current) break;
        int64_t index = current->next++;
        if (current->next == current->count) self->first = current->after;
        pthread_mutex_unlock(&self->lock);
        current->function(current->arguments, index);
        pthread_mutex_lock(&self->lock);
        if (--current->left == 0) pthread_cond_broadcast(&self->done);
    }
    pthread_mutex_unlock(&self->lock);
    return NULL;
}

void pool_run(pool *self, task function, void *arguments, int64_t count) {
    if (count <= 0) return;
    job mine = {function, arguments, 0, count, count, NULL};
    pthread_mutex_lock(&self->lock);
    if (self->first)
        self->last->after = &mine;
    else
        self->first = &mine;
    self->last = &mine;
    pthread_cond_broadcast(&self->work);
    while (mine.left) pthread_cond_wait(&self->done, &self->lock);
    pthread_mutex_unlock(&self->lock);
}

/* Ends the threads. No pool_run may be under way. */
void atoll_pool_close(pool *self) {
    pthread_mutex_lock(&self->lock);
    self->stop = 1;
    pthread_cond_broadcast(&self->work);
    pthread_mutex_unlock(&self->lock);
    for (int i = 0; i < self->num_threads; i++) pthread_join(self->threads[i], NULL);
    pthread_cond_destroy(&self->work);
    pthread_cond_destroy(&self->done);
    pthread_mutex_destroy(&self->lock);
    free(self);
}

/* cpus: NULL, or num_threads numbers of cores, one a thread. niceness: added to the caller's. NULL with errno set if a
 * thread cannot be started. */
pool *atoll_pool_open(int num_threads, const int *cpus, int niceness) {
    pool *self = calloc(1, sizeof(pool) + (size_t)num_threads * sizeof(pthread_t));
    if (!self) return NULL;
    self->niceness = niceness;
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->work, NULL);
    pthread_cond_init(&self->done, NULL);
    sigset_t all, before;
    sigfillset(&all); /* signals are for Python's threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    for (int i = 0; i < num_threads && !error; i++) {
        error = pthread_create(&self->threads[i], NULL, serve, self);
        if (error) break;
        self->num_threads++;
#if defined(__linux__)
        if (cpus) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpus[i], &one);
            error = pthread_setaffinity_np(self->threads[i], sizeof one, &one);
        }
#endif
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        atoll_pool_close(self);
        errno = error;
        return NULL;
    }
    return self;
}
