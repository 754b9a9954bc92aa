// Threads that run kernels together, one kernel after the other, with nothing but barriers between them.
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
    // What the threads share.
    class Board {
    public:
        explicit Board(int threads) : threads(threads), taken(2 * threads) {}

    private:
        friend Team;
        const int threads;
        Counter arrived, barriers;
        std::vector<Counter> taken;  // tasks of each thread, twice: those of one kernel are reset during the next
    };

    const int rank, size;

    Team(Board& board, int rank, int size) : rank(rank), size(size), board(board) {}

    // task(i) for every i below `count`, and a barrier. Each thread has a range of its own, and helps others after it:
    // the operating system may have given the core of one to somebody else.
    template <class F>
    void share(int64_t count, F&& task) {
        Counter *taken = &board.taken[kernels % 2 * board.threads], *next = &board.taken[(kernels + 1) % 2 * board.threads];
        next[rank].value.store(0, std::memory_order_relaxed);
        kernels++;
        for (int i = 0; i < size; i++) {
            const int64_t owner = (rank + i) % size, begin = count * owner / size, end = count * (owner + 1) / size;
            std::atomic<int64_t>& done = taken[owner].value;
            while (begin + done.load(std::memory_order_relaxed) < end) {
                const int64_t at = begin + done.fetch_add(1, std::memory_order_relaxed);
                if (at < end) task(at);
            }
        }
        wait();
    }

private:
    static constexpr int SPINS = 200;  // some microseconds; then whoever else has work may do it
    Board& board;
    int64_t kernels = 0;  // so far

    // Waits for all threads.
    void wait() {
        if (size == 1) return;
        const int64_t now = board.barriers.value.load(std::memory_order_relaxed);
        if (board.arrived.value.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            board.arrived.value.store(0, std::memory_order_relaxed);
            board.barriers.value.store(now + 1, std::memory_order_release);
            return;
        }
        for (int turns = 0; board.barriers.value.load(std::memory_order_acquire) == now; turns++)
            turns < SPINS ? _mm_pause() : void(sched_yield());
    }
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
