// Recorded CUDA graphs.
#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/register.h"
#include "zsseg/cuda_capture.h"
#include "zsseg/cuda_runtime.h"
#include "zsseg/device_array.h"
#include "zsseg/error.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

class Capture {
 public:
  explicit Capture(int device) : device_(device) { cuda::expect_device("device", device); }
  ~Capture() {
    cancel();
    drop();
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  void begin(StreamHandle stream) {
    if (is_recording_) {
      throw CaptureError(
          "capture: expected one that is not recording, got a second begin(). Call end() first.");
    }
    drop();
    cuda::begin_capture(stream, device_);
    stream_ = stream;
    owner_ = OwnedStream::find(stream);
    set_recording(true);
  }

  void end() {
    if (!is_recording_) {
      throw CaptureError(
          "capture: expected one that is recording, got end() alone. Call begin() first.");
    }
    try {
      recording_ = cuda::end_capture(stream_, device_);
    } catch (const CudaError&) {
      forget_stream();
      throw;
    }
    forget_stream();
  }

  void cancel() noexcept {
    if (is_recording_) {
      cuda::cancel_capture(stream_, device_);
      forget_stream();
    }
  }

  void launch(StreamHandle stream) const {
    if (recording_.handle == 0) {
      throw CaptureError(
          "capture: expected a recorded one, got one that is empty. Call begin() and end() first.");
    }
    cuda::launch_recording(recording_, stream, device_);
    if (const std::shared_ptr<OwnedStream> owner = OwnedStream::find(stream)) {
      owner->count_use();  // of all arrays that it holds
    }
  }

  bool is_recording() const { return is_recording_; }
  std::size_t nodes() const { return recording_.nodes; }

 private:
  void forget_stream() {
    // It is still captured where another thread tried to end it.
    set_recording(cuda::is_captured(stream_, device_));
    if (!is_recording_) {
      owner_.reset();
    }
  }

  void set_recording(bool is_recording) {
    is_recording_ = is_recording;
    if (owner_ != nullptr) {
      owner_->set_recording(is_recording);
    }
  }

  void drop() noexcept {
    if (recording_.handle != 0) {
      cuda::destroy_recording(recording_, device_);
      recording_ = {};
    }
  }

  int device_;
  bool is_recording_ = false;
  StreamHandle stream_ = 0;
  std::shared_ptr<OwnedStream> owner_;
  cuda::Recording recording_;
};

}  // namespace

void register_capture(py::module_& module) {
  py::class_<Capture>(module, "Capture")
      .def(py::init<int>(), py::arg("device") = 0)
      .def("begin", &Capture::begin, py::arg("stream"))
      .def("end", &Capture::end)
      .def("cancel", &Capture::cancel)
      .def("launch", &Capture::launch, py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("is_recording", &Capture::is_recording)
      .def_property_readonly("nodes", &Capture::nodes);
}

}  // namespace zsseg::bindings
