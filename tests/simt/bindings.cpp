// The CUDA kernels' launchers and the simulated device, for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>

#include "../../csrc/backend.h"
#include "machine.h"
#ifdef MOEKV_SIMT_HOST
#include "stub_cudart.h"
#else
#include "selftest.h"
#endif

namespace py = pybind11;
using namespace moekv;

namespace {

// A piece of the device's memory.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes), data_(simt::allocate(bytes)) {}
  ~Memory() { simt::release(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
  void write(uintptr_t source) {
    if (bytes_ == 0) return;
    std::memcpy(data_, reinterpret_cast<const void*>(source), bytes_);
    simt::mark_written(data_, bytes_);
  }
  // After the host has written some of it by itself.
  void mark_written(size_t offset, size_t bytes) {
    simt::mark_written(static_cast<char*>(data_) + offset, bytes);
  }
  void read(uintptr_t target) const { std::memcpy(reinterpret_cast<void*>(target), data_, bytes_); }

 private:
  size_t bytes_;
  void* data_;
};

// Fields by name: pointers as addresses, arrays as lists, anything else as it is.
template <typename Params>
class Fields : public py::class_<Params> {
 public:
  Fields(py::module_& module, const char* name)
      : py::class_<Params>(module, name, py::module_local()) {
    this->def(py::init([] { return Params{}; }));
  }

  template <typename T>
  Fields& add(const char* name, size_t offset) {
    return add(
        name, offset, [](const char* field) { return get(*reinterpret_cast<const T*>(field)); },
        [](char* field, py::handle value) { set(*reinterpret_cast<T*>(field), value); });
  }

 private:
  // The same code for all fields: that is half of what this file takes to compile.
  Fields& add(const char* name, size_t offset, py::object (*get)(const char*),
              void (*set)(char*, py::handle)) {
    this->def_property(
        name,
        [=](const Params& params) { return get(reinterpret_cast<const char*>(&params) + offset); },
        [=](Params& params, py::handle value) {
          set(reinterpret_cast<char*>(&params) + offset, value);
        });
    return *this;
  }

  template <typename T>
  static py::object get(const T& value) {
    if constexpr (std::is_pointer_v<T>) {
      return py::int_(reinterpret_cast<uintptr_t>(value));
    } else if constexpr (std::is_array_v<T>) {
      py::list list;
      for (const auto& item : value) list.append(get(item));
      return list;
    } else if constexpr (std::is_enum_v<T>) {
      return py::int_(static_cast<int>(value));
    } else {
      return py::cast(value);
    }
  }
  template <typename T>
  static void set(T& target, py::handle value) {
    if constexpr (std::is_pointer_v<T>) {
      target = reinterpret_cast<T>(value.cast<uintptr_t>());
    } else if constexpr (std::is_array_v<T>) {
      if (py::len(value) != std::size(target)) throw py::value_error("wrong number of items");
      for (size_t i = 0; i < std::size(target); ++i) set(target[i], value[py::int_(i)]);
    } else if constexpr (std::is_enum_v<T>) {
      target = static_cast<T>(value.cast<int>());
    } else {
      target = value.cast<T>();
    }
  }
};

constexpr unsigned kResidents = 4;
char a_stream;  // only its address counts

template <typename Params>
auto launcher(void (*launch)(const Params&, cuda::Stream)) {
  return [launch](const Params& params, uint64_t seed, unsigned residents) {
    simt::set_schedule(seed, residents, &a_stream);
    launch(params, &a_stream);
    simt::check_host();
  };
}

}  // namespace

#define FIELD(name) .add<decltype(P::name)>(#name, offsetof(P, name))

PYBIND11_MODULE(simt_kernels, m) {
  py::register_local_exception<simt::Error>(m, "Error", PyExc_RuntimeError);
  py::class_<Memory>(m, "Memory", py::module_local())
      .def(py::init<size_t>())
      .def_property_readonly("address", &Memory::address)
      .def("write", &Memory::write)
      .def("mark_written", &Memory::mark_written)
      .def("read", &Memory::read);
  m.def("count_traffic", &simt::count_traffic);
  m.def("take_traffic", [] {
    py::list list;
    for (const auto& x : simt::take_traffic()) {
      list.append(py::make_tuple(x.kernel, x.place, x.shared ? "shared" : "global",
                                 x.write ? "write" : "read", x.bytes, x.units, x.least));
    }
    return list;
  });
  m.def("seed", &simt::seed_bug);
  m.def("set_compute_capability", [](int times_10) { simt::compute_capability = times_10; });
  m.attr("RESIDENTS") = kResidents;
#ifdef MOEKV_SIMT_HOST
  m.def("set_limits", [](const std::string& kernel, uint64_t threads, size_t static_shared) {
    simt::set_limits(kernel, {threads, static_shared});
  });
  m.def("take_launches", [] {
    py::list list;
    for (const auto& x : simt::take_launches()) {
      list.append(py::make_tuple(x.kernel, x.threads, x.shared_bytes));
    }
    return list;
  });
  m.def("kernel_names", &simt::kernel_names);
  m.def("fail_next_launch", &simt::fail_next_launch);
#else
  m.def("selftest", [](const std::string& name, uintptr_t data, uint64_t seed) {
    simt::set_schedule(seed, kResidents, nullptr);
    simt::selftest(name, reinterpret_cast<void*>(data));
    simt::check_host();
  });
#endif
#ifndef MOEKV_SIMT_WITHOUT_OPS
  {
    using P = GatingTopkParams;
    Fields<P>(m, "GatingTopkParams") FIELD(logits) FIELD(bias) FIELD(mask) FIELD(importance)
        FIELD(entropy) FIELD(weights) FIELD(experts) FIELD(prob_sum) FIELD(load) FIELD(workspace)
            FIELD(num_tokens) FIELD(num_experts) FIELD(k) FIELD(logits_stride)
                FIELD(inv_temperature) FIELD(dtype);
    m.def("gating_topk", launcher(&cuda::gating_topk));
    m.def("gating_topk_workspace_bytes", &cuda::gating_topk_workspace_bytes);
  }
  {
    using P = ExpertScoresParams;
    Fields<P>(m, "ExpertScoresParams") FIELD(keys) FIELD(values) FIELD(queries) FIELD(start)
        FIELD(scores) FIELD(workspace) FIELD(batch) FIELD(num_kv_heads) FIELD(num_query_heads)
            FIELD(num_keys) FIELD(num_queries) FIELD(key_dim) FIELD(value_dim) FIELD(key_stride)
                FIELD(value_stride) FIELD(query_stride) FIELD(pool) FIELD(lag) FIELD(scaling)
                    FIELD(softcap) FIELD(dtype);
    m.def("expert_scores", launcher(&cuda::expert_scores));
    m.def("expert_scores_workspace_bytes", &cuda::expert_scores_workspace_bytes);
  }
  {
    using P = ExpectedAttentionParams;
    Fields<P>(m, "ExpectedAttentionParams") FIELD(queries) FIELD(keys) FIELD(start) FIELD(scores)
        FIELD(workspace) FIELD(batch) FIELD(num_kv_heads) FIELD(num_query_heads) FIELD(num_keys)
            FIELD(head_dim) FIELD(query_stride) FIELD(key_stride) FIELD(scaling) FIELD(softcap)
                FIELD(dtype);
    m.def("expected_attention", launcher(&cuda::expected_attention));
  }
  {
    using P = ProjectTokensParams;
    Fields<P>(m, "ProjectTokensParams") FIELD(hidden_states) FIELD(weight) FIELD(mask)
        FIELD(projected) FIELD(standout) FIELD(workspace) FIELD(batch) FIELD(num_tokens)
            FIELD(num_channels) FIELD(num_projections) FIELD(stride) FIELD(weight_stride)
                FIELD(dtype);
    m.def("project_tokens", launcher(&cuda::project_tokens));
    m.def("project_tokens_workspace_bytes", &cuda::project_tokens_workspace_bytes);
  }
  {
    using P = MixScoresParams;
    Fields<P>(m, "MixScoresParams") FIELD(scores) FIELD(weights) FIELD(experts) FIELD(gain)
        FIELD(offset) FIELD(mixed) FIELD(num_experts) FIELD(batch) FIELD(num_kv_heads)
            FIELD(num_keys) FIELD(k) FIELD(score_stride) FIELD(weight_stride) FIELD(expert_stride);
    m.def("mix_scores", launcher(&cuda::mix_scores));
  }
  {
    using P = SelectKeptParams;
    Fields<P>(m, "SelectKeptParams") FIELD(scores) FIELD(start) FIELD(total) FIELD(indices)
        FIELD(offsets) FIELD(workspace) FIELD(groups) FIELD(rows) FIELD(num_keys)
            FIELD(score_stride) FIELD(sinks) FIELD(window) FIELD(floor) FIELD(dtype);
    m.def("select_kept", launcher(&cuda::select_kept));
    m.def("select_kept_workspace_bytes", &cuda::select_kept_workspace_bytes);
  }
  {
    using P = KvCompactParams;
    Fields<P>(m, "KvCompactParams") FIELD(keys) FIELD(values) FIELD(indices) FIELD(offsets)
        FIELD(workspace) FIELD(batch) FIELD(num_kv_heads) FIELD(num_keys) FIELD(num_kept)
            FIELD(num_indices) FIELD(key_bytes) FIELD(value_bytes) FIELD(key_stride)
                FIELD(value_stride) FIELD(packed);
    m.def("kv_compact", launcher(&cuda::kv_compact));
    m.def("kv_compact_workspace_bytes", &cuda::kv_compact_workspace_bytes);
  }
  {
    using P = QuantizePairsParams;
    Fields<P>(m, "QuantizePairsParams") FIELD(keys) FIELD(values) FIELD(key_codes)
        FIELD(value_codes) FIELD(scales) FIELD(num_pairs) FIELD(key_dim) FIELD(value_dim)
            FIELD(key_stride) FIELD(value_stride) FIELD(key_bits) FIELD(value_bits) FIELD(dtype);
    m.def("quantize_pairs", launcher(&cuda::quantize_pairs));
  }
  {
    using P = RaggedAttentionParams;
    Fields<P>(m, "RaggedAttentionParams") FIELD(query) FIELD(keys) FIELD(values) FIELD(scales)
        FIELD(bias) FIELD(sinks) FIELD(scale_stride) FIELD(key_bits) FIELD(value_bits) FIELD(begin)
            FIELD(end) FIELD(tail_keys) FIELD(tail_values) FIELD(mask) FIELD(output)
                FIELD(workspace) FIELD(batch) FIELD(num_kv_heads) FIELD(num_query_heads)
                    FIELD(num_queries) FIELD(key_dim) FIELD(value_dim) FIELD(num_stored)
                        FIELD(num_tail) FIELD(query_stride) FIELD(key_stride) FIELD(value_stride)
                            FIELD(tail_key_stride) FIELD(tail_value_stride) FIELD(mask_stride)
                                FIELD(scaling) FIELD(softcap) FIELD(dtype);
    m.def("ragged_attention", launcher(&cuda::ragged_attention));
    m.def("ragged_attention_workspace_bytes", &cuda::ragged_attention_workspace_bytes);
  }
#endif
}
