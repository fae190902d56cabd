// float16 and bfloat16 as bits, so that the CPU kernel needs no compiler that knows them; loops over these vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define VITKERNELS_SHARED __host__ __device__ inline
#else
#define VITKERNELS_SHARED inline
#endif

namespace vitkernels {

struct float16 {
    std::uint16_t bits;
};
struct bfloat16 {
    std::uint16_t bits;
};

VITKERNELS_SHARED std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
VITKERNELS_SHARED float float_of(std::uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

VITKERNELS_SHARED float to_float(float value) { return value; }
VITKERNELS_SHARED float to_float(double value) { return static_cast<float>(value); }
VITKERNELS_SHARED float to_float(bfloat16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }
VITKERNELS_SHARED float to_float(float16 value) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(value.bits));
#else
    const std::uint32_t magnitude = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t subnormal = bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
    const std::uint32_t normal = (magnitude << 13) + (112u << 23);           // exponent bias 15 -> 127
    const std::uint32_t special = (magnitude << 13) | 0x7f800000u;           // infinity and NaN
    const std::uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
    return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

// To the nearest, ties to even.
template <typename T>
VITKERNELS_SHARED T from_float(float value);

template <>
VITKERNELS_SHARED float from_float<float>(float value) {
    return value;
}
template <>
VITKERNELS_SHARED double from_float<double>(float value) {
    return value;
}
template <>
VITKERNELS_SHARED bfloat16 from_float<bfloat16>(float value) {
    const std::uint32_t bits = bits_of(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
VITKERNELS_SHARED float16 from_float<float16>(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const std::uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    const std::uint32_t rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const std::uint32_t normal = rounded < 0x7c00u ? rounded : 0x7c00u;
    // Below 2^-14 halves are multiples of 2^-24: adding 2^23 leaves the rounded multiple in the lowest bits.
    const float tiny = magnitude < (113u << 23) ? float_of(magnitude) : 0.0f;
    const std::uint32_t subnormal = bits_of(tiny * 0x1p24f + 0x1p23f) - 0x4b000000u;
    const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return {static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite))};
#endif
}

}  // namespace vitkernels
