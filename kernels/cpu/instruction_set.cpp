#include <string>

#include "abi.h"

/// The instruction set that this library was compiled for.
EXPORT const char* instruction_set() {
#if defined(__AVX512BF16__)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "plain";
#endif
}

/// Whether this processor, and the system on it, can run the library of that name.
EXPORT int cpu_supports(const char* name) {
  const std::string set = name;
  if (set == "plain") return 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (set == "avx2") return avx2;
  if (set == "avx512") return avx512;
  if (set == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return 0;
}
