// Runs the calls that standard input describes, in order, and writes what has become of their arguments: how kernels
// for another processor are run under an emulator that has no Python. `replay LIBRARY < calls > results`
//
// A call:   text name, int64 count, then per argument: text dtype, int64 rank, rank x int64 sizes, int64 bytes, data
// A result: int64 return code, then the data of every argument
// A text:   int64 length, bytes
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace {

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

int64_t number() {
  int64_t value = -1;
  return read(&value, 8) ? value : -1;
}

std::string text() {
  std::string value(static_cast<size_t>(number()), ' ');
  read(value.data(), value.size());
  return value;
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  using Kernel = int (*)(int, void**, int*, int64_t**, const char**, void*, void*);
  for (int64_t length; (length = number()) >= 0;) {
    std::string name(static_cast<size_t>(length), ' ');
    read(name.data(), name.size());
    const auto count = static_cast<size_t>(number());
    std::vector<std::string> dtypes(count);
    std::vector<std::vector<int64_t>> shapes(count);
    std::vector<std::vector<char>> data(count);
    std::vector<void*> params;
    std::vector<int> ranks;
    std::vector<int64_t*> sizes;
    std::vector<const char*> types;
    for (size_t i = 0; i < count; ++i) {
      dtypes[i] = text();
      shapes[i].resize(static_cast<size_t>(number()));
      read(shapes[i].data(), 8 * shapes[i].size());
      data[i].resize(static_cast<size_t>(number()));
      read(data[i].data(), data[i].size());
      params.push_back(data[i].data());
      ranks.push_back(static_cast<int>(shapes[i].size()));
      sizes.push_back(shapes[i].data());
      types.push_back(dtypes[i].c_str());
    }
    const auto kernel = reinterpret_cast<Kernel>(dlsym(library, name.c_str()));
    if (!kernel) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    const int64_t code = kernel(static_cast<int>(count), params.data(), ranks.data(), sizes.data(), types.data(),
                                nullptr, nullptr);
    std::fwrite(&code, 8, 1, stdout);
    for (const auto& bytes : data) std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  }
}
