// Products of the tensor cores over a warp, c += a b, sums in f32. Included by .cu files only.
//
// Lane 4 g + q (PTX ISA, "Matrix Fragments for mma.m16n8k16" and ".m16n8k8"): c0, c1 are row g, columns 2 q
// and 2 q + 1, and c2, c3 row g + 8. Of a, a0 and a2 belong to row g, a1 and a3 to row g + 8; of b all to
// column g. Which of the summed index an operand is does not matter as long as a and b agree.
#pragma once

#include <cstdint>

namespace ssm::cuda {

// [16 16] x [16 8] of bf16, two in a word: the products are exact.
__device__ inline void multiply_bf16(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                     uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// [16 8] x [8 8] of tf32: f32 of whose mantissa the instruction takes 10 bits, relative error 2^-10.
__device__ inline void multiply_tf32(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                     uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace ssm::cuda
