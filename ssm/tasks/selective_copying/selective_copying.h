// Selective copying: data tokens lie scattered in noise; at the end they must be given back in their order.
//
//   ids      . . a . . . b . c ... . M M M ... M     . = 0, noise; a, b, ...: 16 data tokens 1..14; M = 15
//   targets  - - - - - - - - - ... - a b c ... p     the 16 last positions count
//
// The places of the data are a uniform choice of 16 of the first length - 16; the data are uniform.
// Source     Gu & Dao 2023 (Mamba), section 3.1 and appendix E.1, after Jing et al. 2019.
#pragma once

#include <array>

#include "ssm/tasks/task.h"

namespace ssm::selective_copying {

constexpr int64_t kVocab = 16, kCopies = 16, kSymbols = kVocab - 2;
constexpr int32_t kNoise = 0, kMarker = 15;

Task task();

// Where the data of a sequence stand, increasing.
std::array<int64_t, kCopies> data_positions(uint64_t key, int64_t length);

}  // namespace ssm::selective_copying
