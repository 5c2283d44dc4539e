// A 64-bit hash of bytes, to notice that a file changed or was damaged (not against an adversary), and the
// finaliser of splitmix64 (Steele, Lea & Flood 2014), a bijection of 64-bit integers that mixes well.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace ssm {

constexpr uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Four independent lanes of multiply and rotate: near the memory's speed. hash_bytes(a ++ b) is not
// hash_bytes(b, hash_bytes(a)); the length counts.
inline uint64_t hash_bytes(const void* data, size_t size, uint64_t seed = 0) {
    const auto* p = static_cast<const unsigned char*>(data);
    uint64_t lane[4] = {mix64(seed), mix64(seed + 1), mix64(seed + 2), mix64(seed + 3)};
    const auto take = [](uint64_t h, uint64_t word) {
        return std::rotl((h ^ word) * 0xd6e8feb86659fd93u, 29);
    };
    size_t at = 0;
    for (; at + 32 <= size; at += 32) {
        for (size_t i = 0; i < 4; ++i) {
            uint64_t word;
            std::memcpy(&word, p + at + 8 * i, 8);
            lane[i] = take(lane[i], word);
        }
    }
    for (size_t i = 0; at < size; at += 8, ++i) {
        uint64_t word = 0;
        std::memcpy(&word, p + at, size - at < 8 ? size - at : 8);
        lane[i] = take(lane[i], word);
    }
    uint64_t h = mix64(size);
    for (uint64_t l : lane) h = mix64(h ^ l);
    return h;
}

inline uint64_t hash_bytes(std::string_view text, uint64_t seed = 0) {
    return hash_bytes(text.data(), text.size(), seed);
}

// The hash of a sequence of blocks, each kHashBlock bytes but the last: for files written as a stream.
inline constexpr size_t kHashBlock = size_t{1} << 20;
inline uint64_t hash_blocks(const void* data, size_t size, uint64_t seed = 0) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (size_t at = 0; at < size; at += kHashBlock) {
        seed = hash_bytes(p + at, size - at < kHashBlock ? size - at : kHashBlock, seed);
    }
    return seed;
}

}  // namespace ssm
