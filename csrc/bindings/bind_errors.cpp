// Maps the core's errors to the classes of the same names in zsseg_rt.errors.
#include <pybind11/pybind11.h>

#include "bindings/register.h"
#include "zsseg/error.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

void set_error(const char* class_name, const Error& error) {
  const py::object type = py::module_::import("zsseg_rt.errors").attr(class_name);
  PyErr_SetString(type.ptr(), error.what());
}

void translate(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const ShapeError& error) {
    set_error("ShapeError", error);
  } catch (const DTypeError& error) {
    set_error("DTypeError", error);
  } catch (const DeviceError& error) {
    set_error("DeviceError", error);
  } catch (const ArgumentError& error) {
    set_error("ArgumentError", error);
  } catch (const CaptureError& error) {
    set_error("CaptureError", error);
  } catch (const CudaError& error) {
    set_error("CudaError", error);
  }
}

}  // namespace

void register_errors(py::module_&) {
  py::register_local_exception_translator(&translate);
}

}  // namespace zsseg::bindings
