// A team's tasks and barriers, on threads that ThreadSanitizer sees, unlike those of OpenMP.
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "team.h"

int main() {
    std::mt19937 random(3);
    for (int round = 0; round < 20; round++) {
        const int size = int(1 + random() % 5), kernels = 50;
        std::vector<int> counts(kernels);
        for (int& count : counts) count = int(random() % 12);
        std::vector<int64_t> done(12 * (kernels + 1), 1);  // of each kernel, what each task made of all that was before
        paged::Team::Board board(size);
        const auto work = [&](int rank) {
            paged::Team team(board, rank, size);
            for (int kernel = 0; kernel < kernels; kernel++) {
                const auto task = [&](int64_t i) {
                    int64_t sum = 0;
                    for (int j = 0; j < 12; j++) sum += done[kernel * 12 + j];
                    done[(kernel + 1) * 12 + i] += sum % 1000;  // a task done twice, or never, shows
                };
                team.share(counts[kernel], task);
            }
        };
        std::vector<std::thread> threads;
        const int first = round % 2;  // without the first thread, the others do all; it comes when they have gone
        for (int rank = first; rank < size; rank++) threads.emplace_back(work, rank);
        for (std::thread& thread : threads) thread.join();
        if (first) work(0);
        std::vector<int64_t> want(done.size(), 1);
        for (int kernel = 0; kernel < kernels; kernel++) {
            int64_t sum = 0;
            for (int j = 0; j < 12; j++) sum += want[kernel * 12 + j];
            for (int i = 0; i < counts[kernel]; i++) want[(kernel + 1) * 12 + i] += sum % 1000;
        }
        if (done != want) return std::puts("a task was done twice, or never"), 1;
    }
    std::puts("20 teams");
}
