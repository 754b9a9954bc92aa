// Threads that run kernels together, one kernel after the other, and wait in between for nothing but each other's tasks.
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace paged {

// A thread's place in the team. Kernels are called by all threads of it, with the same arguments.
class Team {
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };

public:
    // What the threads share: counts since they began, which never fall, so that one that comes late does no harm.
    class Board {
    public:
        explicit Board(int threads) : taken(threads) {}

    private:
        friend Team;
        Counter finished;            // tasks
        std::vector<Counter> taken;  // of each thread's ranges
    };

    const int rank, size;

    Team(Board& board, int rank, int size) : rank(rank), size(size), board(board), before(size) {}

    // task(i) for every i below `count`; returns when all are finished. Each thread has a range of its own, and helps
    // others after it: the operating system may have given the core of one to somebody else. Nobody waits for a thread
    // that lost its core between two tasks; it comes after, and finds nothing left of these kernels.
    template <class F>
    void share(int64_t count, F&& task) {
        int64_t done = 0;
        for (int i = 0; i < size; i++) {
            const int64_t owner = (rank + i) % size, begin = count * owner / size, tasks = count * (owner + 1) / size - begin;
            std::atomic<int64_t>& taken = board.taken[owner].value;
            int64_t at = taken.load(std::memory_order_relaxed);
            while (at - before[owner] < tasks)
                if (taken.compare_exchange_weak(at, at + 1, std::memory_order_relaxed)) {
                    task(begin + at - before[owner]);
                    done++;
                    at++;
                }
            before[owner] += tasks;
        }
        all += count;
        if (size == 1) return;
        if (done) board.finished.value.fetch_add(done, std::memory_order_release);
        for (int turns = 0; board.finished.value.load(std::memory_order_acquire) < all; turns++)
            turns < SPINS ? _mm_pause() : void(sched_yield());
    }

private:
    static constexpr int SPINS = 200;  // some microseconds; then whoever else has work may do it
    Board& board;
    int64_t all = 0;              // tasks of kernels so far
    std::vector<int64_t> before;  // of those, the ones in each thread's ranges
};

// work(team) on so many threads, or as many as there are.
template <class F>
void in_team(int threads, F&& work) {
    Team::Board board(threads);
#pragma omp parallel num_threads(threads)
    {
        Team team(board, omp_get_thread_num(), omp_get_num_threads());
        work(team);
    }
}

}  // namespace paged
