// How many threads a call takes, and where they wait for each other.
//
// OpenMP's own barriers spin for milliseconds, and call the kernel even when nobody sleeps. While other processes keep
// the cores busy, or a container has used up its share of processor time, the thread that all wait for is the one that
// does not run. So threads wait busily for some microseconds, then asleep; and after a short call that slept for long
// the next one takes fewer threads. In a long call what a scheduler's time slices hold up is a small part, and one
// thread is hardly ever faster than several. The number of threads changes no result.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <ctime>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace soli {
namespace {  // one copy per file: a copy shared by all could be the one compiled for AVX-512

constexpr int SPINS = 2000;          // about 20 to 60 microseconds; steps of a forward pass take less
constexpr double SHORT_CALL = 0.02;  // seconds; time slices are of some milliseconds

// Threads of the OpenMP team that runs this code, and which of them this is.
inline int64_t team_threads() {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}
inline int64_t team_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Threads for the next call of one caller: half as many after a short one whose first thread slept for a fifth of its
// time (on a quiet machine it hardly sleeps); twice as many again after some calls, after more of them each time this
// fails.
class ThreadBudget {
public:
    int64_t threads(int64_t requested) const { return std::max<int64_t>(1, requested >> halvings_); }

    void report(int64_t threads, double asleep, double total) {
        if (threads > 1 && total < SHORT_CALL && asleep > total / 5) {
            halvings_++;
            patience_ = std::min(2 * patience_, MAX_PATIENCE);
            calls_left_ = patience_;
        } else if (halvings_ == 0) {
            patience_ = std::max(patience_ - 1, MIN_PATIENCE);
        } else if (--calls_left_ <= 0) {
            halvings_--;
            calls_left_ = patience_;
        }
    }

private:
    static constexpr int64_t MIN_PATIENCE = 4;
    static constexpr int64_t MAX_PATIENCE = 256;
    int64_t halvings_ = 0;
    int64_t patience_ = MIN_PATIENCE;
    int64_t calls_left_ = 0;
};

// The threads of one call. Its lifetime is the call's.
class Team {
public:
    // `fixed`: the number of threads, where a call continues what another one began; else 0.
    Team(ThreadBudget& budget, int64_t requested, int64_t fixed = 0)
        : threads(fixed ? fixed : budget.threads(requested)),
          budget_(fixed ? nullptr : &budget),
          start_(now()) {}
    ~Team() {
        if (budget_) budget_->report(threads, asleep_, now() - start_);
    }

    const int64_t threads;

    // The call waited for the disk, which says nothing about the cores.
    void forget() { budget_ = nullptr; }

    // Returns when all threads have called it.
    void barrier() {
        const uint32_t threads = static_cast<uint32_t>(team_threads());
        if (threads == 1) return;
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.fetch_add(1);  // sequentially consistent, as below: either a sleeper sees the new round or is seen
            if (sleepers_.load()) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
            return;
        }
        for (int i = 0; i < SPINS; i++) {
            if (round_.load(std::memory_order_acquire) != round) return;
            pause();
        }
        const double start = now();
        sleepers_.fetch_add(1);
        while (round_.load() == round) futex(FUTEX_WAIT_PRIVATE, round);
        sleepers_.fetch_sub(1);
        if (team_thread() == 0) asleep_ += now() - start;
    }

private:
    void futex(int operation, uint32_t value) { syscall(SYS_futex, &round_, operation, value, nullptr, nullptr, 0); }

    static double now() {
        timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

    ThreadBudget* budget_;
    const double start_;
    double asleep_ = 0;  // of thread 0, seconds
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    std::atomic<uint32_t> sleepers_{0};
};
static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is four bytes");

}  // namespace
}  // namespace soli
