#include "abi.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace run_llm {
namespace {

thread_local std::string error_text;

std::string described(const char* dtype, int rank, const int64_t* sizes) {
  std::string text = std::string(dtype) + " [";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

template <class T>
constexpr const char* dtype_name();
template <>
constexpr const char* dtype_name<float>() { return "float32"; }
template <>
constexpr const char* dtype_name<int32_t>() { return "int32"; }
template <>
constexpr const char* dtype_name<bf16>() { return "bfloat16"; }
template <>
constexpr const char* dtype_name<fp16>() { return "float16"; }

}  // namespace

void* Args::take(const char* name, const char* dtype, const char* shape) {
  const std::string where = std::string(kernel_) + ": " + name + ": ";
  if (next_ >= count_)
    throw std::invalid_argument(where + "missing; got only " + std::to_string(count_) + " arguments");
  const int rank = ndims_[next_];
  const int64_t* sizes = shapes_[next_];
  bool fits = std::strcmp(dtypes_[next_], dtype) == 0;
  std::string wanted;
  int position = 0;
  for (const char* p = shape; *p;) {
    const char* end = p;
    while (*end && *end != ' ') ++end;
    const std::string token(p, end);
    p = *end ? end + 1 : end;
    int64_t size = -1;
    if (token[0] >= '0' && token[0] <= '9') {
      size = std::stoll(token);
    } else {
      for (int i = 0; i < named_; ++i)
        if (token == dims_[i].name) size = dims_[i].size;
    }
    wanted += (position ? ", " : "") + token;
    if (size >= 0 && token != std::to_string(size)) wanted += "=" + std::to_string(size);
    if (position < rank) {
      if (sizes[position] < 1) {
        fits = false;
      } else if (size < 0 && named_ < kMostDims) {
        std::snprintf(dims_[named_].name, sizeof dims_[named_].name, "%s", token.c_str());
        dims_[named_++].size = sizes[position];
      } else if (size != sizes[position]) {
        fits = false;
      }
    }
    ++position;
  }
  fits = fits && position == rank;
  if (!fits)
    throw std::invalid_argument(where + "expected " + dtype + " [" + wanted + "], got " +
                                described(dtypes_[next_], rank, sizes));
  return params_[next_++];
}

template <class T>
const T* Args::input(const char* name, const char* shape) {
  return static_cast<const T*>(take(name, dtype_name<T>(), shape));
}
template <class T>
T* Args::output(const char* name, const char* shape) {
  return static_cast<T*>(take(name, dtype_name<T>(), shape));
}
template const float* Args::input<float>(const char*, const char*);
template const int32_t* Args::input<int32_t>(const char*, const char*);
template const bf16* Args::input<bf16>(const char*, const char*);
template const fp16* Args::input<fp16>(const char*, const char*);
template float* Args::output<float>(const char*, const char*);
template int32_t* Args::output<int32_t>(const char*, const char*);
template bf16* Args::output<bf16>(const char*, const char*);
template fp16* Args::output<fp16>(const char*, const char*);

bool Args::absent() const { return next_ < count_ && ndims_[next_] == 1 && shapes_[next_][0] == 1; }

bool Args::next_is(const char* dtype) const { return next_ < count_ && std::strcmp(dtypes_[next_], dtype) == 0; }

int Args::next_rank() const { return next_ < count_ ? ndims_[next_] : 0; }

int64_t Args::size(const char* name) const {
  for (int i = 0; i < named_; ++i)
    if (std::strcmp(dims_[i].name, name) == 0) return dims_[i].size;
  throw std::logic_error(std::string(kernel_) + ": no dimension " + name);
}

void Args::require(bool condition, const char* argument, const char* what) const {
  if (!condition) throw std::invalid_argument(std::string(kernel_) + ": " + argument + ": " + what);
}

void Args::done() const {
  if (next_ != count_)
    throw std::invalid_argument(std::string(kernel_) + ": got " + std::to_string(count_) + " arguments, takes " +
                                std::to_string(next_));
}

int guarded(const char* kernel, void (*body)(Args&), Args& args) {
  try {
    body(args);
    return 0;
  } catch (const std::bad_alloc&) {
    error_text = std::string(kernel) + ": not enough memory for its scratch space";
  } catch (const std::logic_error& error) {  // of Args, which has named the kernel
    error_text = error.what();
  } catch (const std::exception& error) {
    error_text = std::string(kernel) + ": " + error.what();
  }
  std::fprintf(stderr, "run_llm kernels: %s\n", error_text.c_str());
  return 1;
}

}  // namespace run_llm

/// What the last failed call of this thread said.
EXPORT const char* last_error() { return run_llm::error_text.c_str(); }
