/* Stand-ins for NVIDIA's calls that hand frames to CUDA, on memory of the host.

   The structures are written down from nvbufsurface.h (JetPack 6), cudaEGL.h and cuda.h, apart from
   the package's own, so that a C compiler's layout is compared with them. An array is a plane
   with its rows in reverse: who takes it for rows one after the other sees a wrong picture. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  uint32_t num_planes, width[4], height[4], pitch[4], offset[4], psize[4], bytesPerPix[4];
  void* _reserved[16];
} NvBufSurfacePlaneParams;

typedef struct {
  void* addr[4];
  void* eglImage;
  void* _reserved[4];
} NvBufSurfaceMappedAddr;

typedef struct {
  uint32_t width, height, pitch;
  int colorFormat, layout;
  uint64_t bufferDesc;
  uint32_t dataSize;
  void* dataPtr;
  NvBufSurfacePlaneParams planeParams;
  NvBufSurfaceMappedAddr mappedAddr;
  void* paramex;
  void* _reserved[3];
} NvBufSurfaceParams;

typedef struct {
  uint32_t gpuId, batchSize, numFilled;
  bool isContiguous;
  int memType;
  NvBufSurfaceParams* surfaceList;
  void* _reserved[4];
} NvBufSurface;

typedef struct {
  union {
    void* pArray[3];
    void* pPitch[3];
  } frame;
  unsigned int width, height, depth, pitch, planeCount, numChannels;
  int frameType, eglColorFormat, cuFormat;
} CUeglFrame;

typedef struct {
  size_t srcXInBytes, srcY;
  int srcMemoryType;
  const void* srcHost;
  unsigned long long srcDevice;
  void* srcArray;
  size_t srcPitch;
  size_t dstXInBytes, dstY;
  int dstMemoryType;
  void* dstHost;
  unsigned long long dstDevice;
  void* dstArray;
  size_t dstPitch;
  size_t WidthInBytes, Height;
} CUDA_MEMCPY2D;

typedef struct {
  uint8_t* data;
  size_t pitch, rows;
} Plane;

/* What is held, and how often a call was made; the call that shall fail, 0 for none. */
_Atomic int stand_in_images, stand_in_resources, stand_in_copies, stand_in_fails;
/* Whether surfaces that are made here lie in blocks. */
int stand_in_in_blocks;

/* Two planes, whose rows have some bytes between them. */
static void lay_out(NvBufSurfaceParams* params, int width, int height, int color, int in_blocks) {
  params->width = width;
  params->height = height;
  params->colorFormat = color;
  params->layout = in_blocks;
  params->planeParams.num_planes = 2;
  params->pitch = (width + 255) / 256 * 256;
  Plane* planes = calloc(2, sizeof *planes);
  params->dataPtr = planes;
  for (int p = 0; p < 2; ++p) {
    params->planeParams.width[p] = width;
    planes[p].pitch = params->planeParams.pitch[p] = params->pitch + 256 * p;
    planes[p].rows = params->planeParams.height[p] = p ? height / 2 : height;
    planes[p].data = malloc(planes[p].pitch * planes[p].rows);
  }
}

size_t stand_in_surface(uint8_t* nv12, int height, int width, int color, int in_blocks, void* out) {
  NvBufSurface* surface = out;
  NvBufSurfaceParams* params = calloc(1, sizeof *params);
  memset(surface, 0, sizeof *surface);
  surface->batchSize = surface->numFilled = 1;
  surface->memType = 4;
  surface->surfaceList = params;
  lay_out(params, width, height, color, in_blocks);
  Plane* planes = params->dataPtr;
  for (int p = 0; p < 2; ++p) {
    for (size_t row = 0; row < planes[p].rows; ++row, nv12 += width) {
      const size_t at = in_blocks ? planes[p].rows - 1 - row : row;
      memcpy(planes[p].data + at * planes[p].pitch, nv12, width);
    }
  }
  return sizeof *surface;
}

int NvBufSurfaceMapEglImage(NvBufSurface* surface, int index) {
  if (stand_in_fails == 1)
    return -1;
  ++stand_in_images;
  surface->surfaceList[index].mappedAddr.eglImage = &surface->surfaceList[index];
  return 0;
}

int NvBufSurfaceUnMapEglImage(NvBufSurface* surface, int index) {
  --stand_in_images;
  surface->surfaceList[index].mappedAddr.eglImage = 0;
  return 0;
}

int cuGraphicsEGLRegisterImage(void** resource, void* image, unsigned int flags) {
  if (stand_in_fails == 2 || image == 0)
    return 999;
  if (flags != 1)
    return 999;
  ++stand_in_resources;
  *resource = image;
  return 0;
}

int cuGraphicsResourceGetMappedEglFrame(CUeglFrame* frame, void* resource, unsigned int index,
                                        unsigned int level) {
  const NvBufSurfaceParams* params = resource;
  Plane* planes = params->dataPtr;
  if (index != 0 || level != 0)
    return 1;
  frame->width = params->width;
  frame->height = params->height;
  frame->pitch = params->pitch;
  frame->planeCount = params->planeParams.num_planes;
  frame->frameType = params->layout ? 0 : 1;
  for (int p = 0; p < 2; ++p) {
    frame->frame.pPitch[p] = params->layout ? (void*)&planes[p] : planes[p].data;
  }
  return 0;
}

int cuGraphicsUnregisterResource(void* resource) {
  --stand_in_resources;
  return resource == 0;
}

/* From an array (3), whose rows are in reverse, or a GPU's memory (2) to a GPU's memory. */
static int copy_planes(const CUDA_MEMCPY2D* copy) {
  const Plane* array = copy->srcArray;
  const int is_array = copy->srcMemoryType == 3;
  for (size_t row = 0; row < copy->Height; ++row) {
    const uint8_t* from = is_array ? array->data + (array->rows - 1 - row) * array->pitch
                                   : (uint8_t*)(uintptr_t)copy->srcDevice + row * copy->srcPitch;
    memcpy((uint8_t*)(uintptr_t)copy->dstDevice + row * copy->dstPitch, from, copy->WidthInBytes);
  }
  return copy->dstMemoryType != 2;
}

int cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* copy, void* stream) {
  if (stand_in_fails == 3)
    return 1;
  stand_in_copies += stream != 0;
  return copy_planes(copy);
}
