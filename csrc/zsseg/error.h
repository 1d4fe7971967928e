// Errors the core throws. The bindings map each to the class of that name in zsseg_rt.errors.
// A message reads "argument: expected X, got Y. What to do."
#pragma once

#include <stdexcept>
#include <string>

namespace zsseg {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class ShapeError : public Error {  // wrong sizes or memory layout
  using Error::Error;
};

class DTypeError : public Error {  // wrong element type, or not an array
  using Error::Error;
};

class DeviceError : public Error {  // on the wrong device, or the device is absent
  using Error::Error;
};

class ArgumentError : public Error {  // a setting outside its range
  using Error::Error;
};

class CudaError : public Error {  // a CUDA call failed
  using Error::Error;
};

class CaptureError : public CudaError {  // what a capture cannot record
  using CudaError::CudaError;
};

}  // namespace zsseg
