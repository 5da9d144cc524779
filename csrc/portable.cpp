// What the headers of a newer libstdc++ leave to its library, defined here: wheels run with that of every system that has
// glibc 2.28 (manylinux_2_28).
#include <new>
#include <sstream>
#include <string>

#ifdef __GLIBCXX__
extern "C" {
// Of glibc 2.32. It stays 0: reference counts are changed atomically, which is always right.
__attribute__((visibility("hidden"))) char __libc_single_threaded;
}

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }  // of GCC 11
}  // namespace std

template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
#if __cplusplus >= 202002L && defined(_GLIBCXX_USE_CXX11_ABI) && _GLIBCXX_USE_CXX11_ABI
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
#endif
#endif
