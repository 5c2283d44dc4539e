// The kinds of device, and what this build can drive.
#pragma once

namespace ssm {

enum class Device { cpu, cuda };

#if defined(SSM_HAS_CUDA)
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

}  // namespace ssm
