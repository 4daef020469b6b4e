/* A persistent pool of threads. Jobs are cut into tasks 0..count-1; jobs queue first in, first out. */
#ifndef ATOLL_POOL_H
#define ATOLL_POOL_H

#include <stdint.h>

typedef struct pool pool;
typedef void (*task)(void *arguments, int64_t index);

/* Runs all tasks of a job and returns when the last has ended. Any number of threads may call it at once. */
void pool_run(pool *self, task function, void *arguments, int64_t count);

#endif
