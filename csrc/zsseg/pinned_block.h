// Host memory that the GPU reads and writes by itself, while the host does other things.
#pragma once

#include <cstddef>
#include <memory>

namespace zsseg {

// Page-locked and mapped. A block that goes is kept for the next of its size, up to 256 MiB of
// them: making one takes the driver a millisecond. A 4K frame's labels and scores take 42 MB, and
// callers hold one result while the next is made. Nothing may be left to do on its memory by then.
class PinnedBlock {
 public:
  static std::shared_ptr<PinnedBlock> create(std::size_t bytes, int device);
  ~PinnedBlock();
  PinnedBlock(const PinnedBlock&) = delete;
  PinnedBlock& operator=(const PinnedBlock&) = delete;

  void* host() const { return host_; }
  void* mapped() const { return mapped_; }  // the same memory at the GPU's address
  std::size_t bytes() const { return bytes_; }
  int device() const { return device_; }

 private:
  PinnedBlock(void* host, void* mapped, std::size_t bytes, int device)
      : host_(host), mapped_(mapped), bytes_(bytes), device_(device) {}

  void* host_;
  void* mapped_;
  std::size_t bytes_;
  int device_;
};

}  // namespace zsseg
