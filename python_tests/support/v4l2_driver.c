// A camera's driver, by LD_PRELOAD: what FFmpeg asks of /dev/video7 is answered here.
//
// No kernel is needed: the device is a memfd, which mmap takes as it is. Pictures tell their number
// by their grey level, as support.streams.numbered does. A test steers it through the variables
// below, with ctypes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { BUFFERS = 4, SLOT = 1 << 14, STAMPS = 4096 };

volatile int driver_open_error;    // errno of open
volatile int driver_format_error;  // errno of setting the format: EBUSY while another program reads
volatile int driver_read_error;    // errno of waiting for a picture: ENODEV once it is unplugged
volatile int driver_is_stuck;      // waiting for a picture never returns
volatile int driver_no_camera;     // 1: the device is no video device; 2: it gives no pictures
volatile int driver_damaged;       // so many pictures to come arrive damaged
volatile int driver_tells_date;    // stamps are the time of day, as old drivers' are
volatile int driver_rgb;           // pictures are RGB24, not YUYV
volatile int driver_lent;          // buffers that were not given back before the end
long long driver_stamps[STAMPS];   // when each picture was taken, in microseconds

static const char NAME[] = "/dev/video7";
static int device = -1, width = 64, height = 48, rate = 50, taken;
static int queue[BUFFERS], queued;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int fail(int code) {
  errno = code;
  return -1;
}

static unsigned picture_size(void) {
  return width * height * (driver_rgb ? 3 : 2);
}

static long long now(clockid_t clock) {
  struct timespec time;
  clock_gettime(clock, &time);
  return time.tv_sec * 1000000LL + time.tv_nsec / 1000;
}

static int open_device(void) {
  if (driver_open_error)
    return fail(driver_open_error);
  queued = 0;
  device = memfd_create("camera", MFD_CLOEXEC);
  return ftruncate(device, BUFFERS * SLOT) < 0 ? -1 : device;
}

static int format(struct v4l2_format* asked) {
  const unsigned kind = driver_rgb ? V4L2_PIX_FMT_RGB24 : V4L2_PIX_FMT_YUYV;
  asked->fmt.pix.pixelformat = kind;
  asked->fmt.pix.width = width;
  asked->fmt.pix.height = height;
  asked->fmt.pix.field = V4L2_FIELD_NONE;
  asked->fmt.pix.sizeimage = picture_size();
  return 0;
}

static int set_format(struct v4l2_format* asked) {
  if (driver_format_error)
    return fail(driver_format_error);
  if (asked->fmt.pix.width <= 64 && asked->fmt.pix.height <= 48) {
    width = asked->fmt.pix.width & ~1U;
    height = asked->fmt.pix.height;
  }
  return format(asked);
}

static int describe(struct v4l2_buffer* buffer) {
  buffer->length = SLOT;
  buffer->m.offset = buffer->index * SLOT;
  return 0;
}

static int give_back(struct v4l2_buffer* buffer) {
  pthread_mutex_lock(&lock);
  queue[queued++] = buffer->index;
  pthread_mutex_unlock(&lock);
  return 0;
}

static void paint(unsigned char* pixels, int number) {
  const unsigned char grey = 16 + number * 8 % 224;
  if (driver_rgb) {
    memset(pixels, grey, picture_size());
    return;
  }
  for (unsigned i = 0; i < picture_size(); i += 2) {
    pixels[i] = 16 + (grey * 219 + 127) / 255;  // the narrow range of video
    pixels[i + 1] = 128;
  }
}

static int take(struct v4l2_buffer* buffer, int fd) {
  while (driver_is_stuck)
    pause();
  usleep(1000000 / rate);
  if (driver_read_error)
    return fail(driver_read_error);
  pthread_mutex_lock(&lock);
  buffer->index = queue[0];
  memmove(queue, queue + 1, --queued * sizeof(queue[0]));
  pthread_mutex_unlock(&lock);
  const long long stamp = now(driver_tells_date ? CLOCK_REALTIME : CLOCK_MONOTONIC) - 5000;
  driver_stamps[taken % STAMPS] = stamp;
  buffer->timestamp.tv_sec = stamp / 1000000;
  buffer->timestamp.tv_usec = stamp % 1000000;
  unsigned char pixels[SLOT];
  paint(pixels, taken++);
  if (pwrite(fd, pixels, picture_size(), buffer->index * SLOT) < 0)
    return -1;
  buffer->bytesused = picture_size();
  buffer->flags = driver_damaged > 0 ? V4L2_BUF_FLAG_ERROR : 0;
  driver_damaged -= driver_damaged > 0;
  return 0;
}

static int answer(int fd, unsigned long request, void* given) {
  struct v4l2_capability* abilities = given;
  struct v4l2_captureparm* pace = &((struct v4l2_streamparm*)given)->parm.capture;
  if (driver_no_camera == 1)
    return fail(ENOTTY);
  switch (request) {
    case VIDIOC_QUERYCAP:
      memset(abilities, 0, sizeof(*abilities));
      abilities->capabilities = V4L2_CAP_STREAMING;
      if (!driver_no_camera)
        abilities->capabilities |= V4L2_CAP_VIDEO_CAPTURE;
      return 0;
    case VIDIOC_G_INPUT:
      return *(int*)given = 0;
    case VIDIOC_ENUMINPUT:
      return 0;
    case VIDIOC_G_FMT:
      return format(given);
    case VIDIOC_S_FMT:
      return set_format(given);
    case VIDIOC_S_PARM:
      rate = pace->timeperframe.denominator / pace->timeperframe.numerator;
    // fall through
    case VIDIOC_G_PARM:
      pace->capability = V4L2_CAP_TIMEPERFRAME;
      pace->timeperframe.numerator = 1;
      pace->timeperframe.denominator = rate;
      return 0;
    case VIDIOC_REQBUFS:
      if (driver_format_error)
        return fail(driver_format_error);
      ((struct v4l2_requestbuffers*)given)->count = BUFFERS;
      return 0;
    case VIDIOC_QUERYBUF:
      return describe(given);
    case VIDIOC_QBUF:
      return give_back(given);
    case VIDIOC_DQBUF:
      return take(given, fd);
    case VIDIOC_STREAMON:
      return 0;
    case VIDIOC_STREAMOFF:
      driver_lent += BUFFERS - queued;
      return 0;
    default:
      return fail(ENOTTY);
  }
}

int open64(const char* path, int flags, ...) {
  if (strcmp(path, NAME) == 0)
    return open_device();
  va_list rest;
  va_start(rest, flags);
  const int mode = va_arg(rest, int);
  va_end(rest);
  return ((int (*)(const char*, int, ...))dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}

int open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const int mode = va_arg(rest, int);
  va_end(rest);
  return open64(path, flags, mode);
}

int ioctl(int fd, unsigned long request, ...) {
  va_list rest;
  va_start(rest, request);
  void* given = va_arg(rest, void*);
  va_end(rest);
  if (fd >= 0 && fd == device)
    return answer(fd, request, given);
  return ((int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl"))(fd, request, given);
}

int close(int fd) {
  if (fd >= 0 && fd == device)
    device = -1;
  return ((int (*)(int))dlsym(RTLD_NEXT, "close"))(fd);
}
