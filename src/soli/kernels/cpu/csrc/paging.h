// Experts that are not all in memory: each has a state, which a reading thread changes while a kernel runs.
#pragma once
#include <chrono>
#include <cstdint>
#include <ctime>

namespace soli {
namespace {

// In the order of EXPERT_STATES in ../__init__.py. Only a PRESENT expert has an address that may be read.
enum ExpertState : uint8_t { MISSING, READING, PRESENT, FAILED };

inline ExpertState load_state(const uint8_t* state) {
    return static_cast<ExpertState>(__atomic_load_n(state, __ATOMIC_ACQUIRE));
}

inline int64_t nanoseconds() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Returns when an expert is no longer being read; whether it is in memory. A read takes milliseconds, so the thread
// sleeps and leaves its core to whoever reads. `waited` gets the nanoseconds on top.
inline bool wait_until_present(const uint8_t* state, int64_t& waited) {
    ExpertState now = load_state(state);
    if (now != READING) return now == PRESENT;
    const int64_t start = nanoseconds();
    for (; now == READING; now = load_state(state)) {
        const timespec pause = {0, 20'000};
        nanosleep(&pause, nullptr);
    }
    waited += nanoseconds() - start;
    return now == PRESENT;
}

}  // namespace
}  // namespace soli
