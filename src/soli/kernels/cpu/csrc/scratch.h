// Memory that a thread keeps between calls.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace soli {
namespace {  // one copy per file: a copy shared by all could be the one compiled for AVX-512

// Reused, because a fresh large block would cost a page fault for every 4 KiB.
class Scratch {
public:
    ~Scratch() { std::free(base_); }
    // Start over with `bytes` of memory; false when there is not so much.
    bool reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return true;
        std::free(base_);
        size_ = (bytes + 4095) / 4096 * 4096;
        base_ = static_cast<uint8_t*>(std::aligned_alloc(4096, size_));
        if (!base_) size_ = 0;
        return base_ != nullptr;
    }
    // The next `count` values, aligned to a cache line.
    template <class V>
    V* take(size_t count) {
        V* values = reinterpret_cast<V*>(base_ + used_);
        used_ += bytes<V>(count);
        return values;
    }
    template <class V>
    static size_t bytes(size_t count) {
        return (count * sizeof(V) + 63) / 64 * 64;
    }

private:
    uint8_t* base_ = nullptr;
    size_t size_ = 0;
    size_t used_ = 0;
};

}  // namespace
}  // namespace soli
