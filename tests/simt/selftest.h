// The kernels that test the simulator itself.
#pragma once

#include <string>

namespace simt {

// Runs the kernel `name` on its array.
void selftest(const std::string& name, void* data);

}  // namespace simt
