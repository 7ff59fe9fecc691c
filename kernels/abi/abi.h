// How a kernel is called: MindSpore's ahead-of-time custom operator, with its arguments checked by name.
//
// A source file defines an operator as
//
//     KERNEL(rms_norm_forward) {
//       auto x = args.input<float>("x", "N D");
//       auto weight = args.input<float>("weight", "D");
//       auto y = args.output<float>("y", "N D");
//       const int64_t rows = args.size("N"), width = args.size("D");
//       ...
//     }
//
// and the library exports `rms_norm_forward` in the form that ops.Custom loads: 0 is success, anything else an
// error whose text `last_error()` gives. The library needs nothing of MindSpore's headers.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace run_llm {

/// A bfloat16 number as it lies in memory: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

/// A number of IEEE 754's binary16.
struct fp16 {
  uint16_t bits;
};

/// The arguments of one call, taken in order: inputs first, outputs after them.
///
/// A shape is written as dimension names and numbers with spaces between: "B S H 2". A name stands for any size
/// when it is met first and for that same size afterwards. Whatever does not fit throws, naming the argument; so does
/// an array without elements, which no kernel has a use for (nor has MindSpore).
class Args {
 public:
  Args(const char* kernel, int count, void** params, int* ndims, int64_t** shapes, const char** dtypes, void* stream)
      : kernel_(kernel), count_(count), params_(params), ndims_(ndims), shapes_(shapes), dtypes_(dtypes),
        stream_(stream) {}

  /// Next argument; T is float, int32_t, bf16 or fp16.
  template <class T>
  const T* input(const char* name, const char* shape);
  template <class T>
  T* output(const char* name, const char* shape);

  /// Whether the next argument is a single number while its place calls for more: "none given".
  bool absent() const;
  /// Step over the next argument.
  void skip() { ++next_; }
  /// Whether the next argument holds numbers of that dtype's name.
  bool next_is(const char* dtype) const;
  /// Number of dimensions of the next argument.
  int next_rank() const;

  /// The GPU's stream that the call belongs to; null on a CPU.
  void* stream() const { return stream_; }
  /// Size of a dimension that has been named so far.
  int64_t size(const char* name) const;
  /// Throw "kernel: argument: what" unless the condition holds.
  void require(bool condition, const char* argument, const char* what) const;
  /// Throw unless every argument has been taken.
  void done() const;

 private:
  void* take(const char* name, const char* dtype, const char* shape);

  static constexpr int kMostDims = 16;
  struct Dim {
    char name[16];
    int64_t size;
  };
  const char* kernel_;
  int count_;
  void** params_;
  int* ndims_;
  int64_t** shapes_;
  const char** dtypes_;
  void* stream_;
  int next_ = 0;
  Dim dims_[kMostDims];
  int named_ = 0;
};

/// Run `body`; its exceptions become a return code and the text of last_error().
int guarded(const char* kernel, void (*body)(Args&), Args& args);

}  // namespace run_llm

#define KERNEL(name)                                                                                       \
  static void name##_body(run_llm::Args& args);                                                            \
  EXPORT int name(int count, void** params, int* ndims, int64_t** shapes, const char** dtypes, void* stream, \
                  void*) {                                                                                  \
    run_llm::Args args(#name, count, params, ndims, shapes, dtypes, stream);                               \
    return run_llm::guarded(#name, name##_body, args);                                                     \
  }                                                                                                        \
  static void name##_body(run_llm::Args& args)
