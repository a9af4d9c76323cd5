// What headers of newer systems want of libraries that older ones do not have. Each library gets its
// own, which csrc/exports.map hides.
#include <new>
#include <sstream>

extern "C" {
extern char __libc_single_threaded;
// glibc 2.32: whether reference counts may do without atomic operations. They may not.
char __libc_single_threaded = 0;
}

namespace std {
// GCC 11's libstdc++.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// GCC 9's and 11's: default constructors and str() &&.
template class std::basic_stringbuf<char>;
template class std::basic_istringstream<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
