// Devices, streams and events, threads and instruction sets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings/register.h"
#include "zsseg/cpu_dispatch.h"
#include "zsseg/cuda_runtime.h"
#include "zsseg/device_array.h"
#include "zsseg/thread_pool.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

class Event {
 public:
  Event(int device, bool timing, bool blocking)
      : handle_(cuda::create_event(device, {timing, blocking})), device_(device), timing_(timing) {}
  ~Event() { cuda::destroy_event(handle_, device_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // A time is taken at every launch of a capture; what orders streams is a part of it.
  void record(StreamHandle stream) { cuda::record_event(handle_, stream, device_, timing_); }
  void wait(StreamHandle stream) const { cuda::wait_event(stream, handle_, device_); }
  void synchronize() const { cuda::synchronize_event(handle_, device_); }
  float elapsed_ms(const Event& later) const { return cuda::elapsed_ms(handle_, later.handle_); }

 private:
  std::uintptr_t handle_;
  int device_;
  bool timing_;
};

py::dict device_properties(int device) {
  const cuda::DeviceProperties gpu = cuda::device_properties(device);
  py::dict properties;
  properties["name"] = gpu.name;
  properties["compute_capability"] = std::to_string(gpu.major) + "." + std::to_string(gpu.minor);
  properties["total_memory"] = gpu.total_memory;
  properties["multiprocessors"] = gpu.multiprocessors;
  properties["driver"] = gpu.driver;
  properties["integrated"] = gpu.integrated;
  return properties;
}

std::string runtime_version() {
  const int version = cuda::runtime_version();
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::vector<std::string> available_isa_names() {
  std::vector<std::string> names;
  for (const CpuIsa isa : available_cpu_isas()) {
    names.emplace_back(name_of(isa));
  }
  return names;
}

void register_streams(py::module_& module) {
  py::class_<OwnedStream, std::shared_ptr<OwnedStream>>(module, "Stream")
      .def(py::init(&OwnedStream::create), py::arg("device") = 0, py::kw_only(),
           py::arg("sleeps") = py::none())
      .def_property_readonly("handle", &OwnedStream::handle)
      .def_property_readonly("device", &OwnedStream::device)
      .def("synchronize", &OwnedStream::synchronize, py::call_guard<py::gil_scoped_release>());
  py::class_<Event>(module, "Event")
      .def(py::init<int, bool, bool>(), py::arg("device") = 0, py::kw_only(),
           py::arg("timing") = true, py::arg("blocking") = false)
      .def("record", &Event::record, py::arg("stream"))
      .def("wait", &Event::wait, py::arg("stream"))
      .def("synchronize", &Event::synchronize, py::call_guard<py::gil_scoped_release>())
      .def("elapsed_ms", &Event::elapsed_ms, py::arg("later"));
}

}  // namespace

void register_device(py::module_& module) {
  register_streams(module);
  module.attr("built_with_cuda") = cuda::is_built();
  module.def("cuda_runtime_version", []() -> py::object {
    return cuda::is_built() ? py::object(py::str(runtime_version())) : py::none();
  });
  module.def("cuda_device_count", &cuda::device_count);
  module.def("cuda_device_properties", &device_properties, py::arg("device") = 0);
  module.def("cuda_set_device", &cuda::set_current_device, py::arg("device"), py::kw_only(),
             py::arg("only_active") = false);
  module.def("cpu_isa", [] { return std::string(name_of(cpu_isa())); });
  module.def("available_cpu_isas", &available_isa_names);
  module.def("set_cpu_isa", &set_cpu_isa, py::arg("name"));
  module.def("get_num_threads", &num_threads);
  module.def("set_num_threads", &set_num_threads, py::arg("count"));
  module.def("set_thread_limit", &set_thread_limit, py::arg("count"));
}

}  // namespace zsseg::bindings
