#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "zsseg/ops/move_labels.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kLarge = 640;  // pixels: labels of a larger frame are moved in squares
constexpr float kOutside = 2.0f;  // pixels of the small frame by which a flow's end may be wrong
constexpr int kAround = 2;        // pixels to each side over which differences are averaged

enum Place : std::uint8_t { kMoved, kRests, kLost };

struct Size {
  std::int64_t height, width;
};

// Index of a pixel beyond an end, mirrored about the last one.
std::int64_t mirrored(std::int64_t i, std::int64_t size) {
  return i < 0 ? -i : i >= size ? 2 * size - 2 - i : i;
}

// The neighbours of a place between pixels, at most the ends, and the share of the second one.
struct Between {
  std::int64_t first, second;
  float share;
};

Between between(float place, std::int64_t size) {
  const float last = static_cast<float>(size - 1);
  const float inside = std::min(std::max(0.0f, place), last);  // NaN becomes 0
  const auto first = static_cast<std::int64_t>(inside);
  return {first, std::min(first + 1, size - 1), inside - static_cast<float>(first)};
}

float lerp(float first, float second, float share) {
  return first + (second - first) * share;
}

// Mean of three channels by which `now` differs from `start` seen along `flow`, none for at rest.
void differences(const std::uint8_t* now, const std::uint8_t* start, const float* flow,
                 const Size& size, std::uint8_t* out) {
  for (std::int64_t y = 0; y < size.height; ++y) {
    for (std::int64_t x = 0; x < size.width; ++x) {
      const std::int64_t i = y * size.width + x;
      int sum = 0;
      if (flow == nullptr) {
        for (int channel = 0; channel < 3; ++channel) {
          sum += std::abs(now[3 * i + channel] - start[3 * i + channel]);
        }
      } else {
        const Between across = between(static_cast<float>(x) + flow[2 * i], size.width);
        const Between down = between(static_cast<float>(y) + flow[2 * i + 1], size.height);
        const std::uint8_t* above = start + 3 * down.first * size.width;
        const std::uint8_t* below = start + 3 * down.second * size.width;
        for (int channel = 0; channel < 3; ++channel) {
          const std::int64_t left = 3 * across.first + channel, right = 3 * across.second + channel;
          const float value = lerp(lerp(above[left], above[right], across.share),
                                   lerp(below[left], below[right], across.share), down.share);
          sum += std::abs(now[3 * i + channel] - static_cast<int>(value + 0.5f));
        }
      }
      out[i] = static_cast<std::uint8_t>((sum + 1) / 3);
    }
  }
}

// Means over a square around each pixel, in place; `sums` has as many elements.
void average(std::uint8_t* values, const Size& size, std::uint16_t* sums) {
  constexpr int kSide = 2 * kAround + 1, kPixels = kSide * kSide;
  for (std::int64_t y = 0; y < size.height; ++y) {
    const std::uint8_t* row = values + y * size.width;
    std::uint16_t* to = sums + y * size.width;
    const auto at = [&](std::int64_t x) { return row[mirrored(x, size.width)]; };
    for (std::int64_t x = 0; x < size.width; ++x) {
      const bool is_inside = x >= kAround && x + kAround < size.width;
      to[x] = static_cast<std::uint16_t>(
          is_inside ? row[x - 2] + row[x - 1] + row[x] + row[x + 1] + row[x + 2]
                    : at(x - 2) + at(x - 1) + at(x) + at(x + 1) + at(x + 2));
    }
  }
  for (std::int64_t y = 0; y < size.height; ++y) {
    const auto row = [&](std::int64_t offset) {
      return sums + mirrored(y + offset, size.height) * size.width;
    };
    const std::uint16_t *a = row(-2), *b = row(-1), *c = row(0), *d = row(1), *e = row(2);
    for (std::int64_t x = 0; x < size.width; ++x) {
      values[y * size.width + x] =
          static_cast<std::uint8_t>((a[x] + b[x] + c[x] + d[x] + e[x] + kPixels / 2) / kPixels);
    }
  }
}

// Chooses a flow at each place, writes it, and says what becomes of the place.
std::vector<std::uint8_t> choose(const MoveLabels& arrays, const MoveLimits& limits,
                                 const Size& size) {
  const std::int64_t count = size.height * size.width;
  std::vector<std::uint8_t> rest(count), moved(count), other(count), places(count);
  std::vector<std::uint16_t> sums(count);
  const auto *now = arrays.now.as<const std::uint8_t>(),
             *start = arrays.start.as<const std::uint8_t>();
  const auto* flow = arrays.flow.as<const float>();
  const auto* refined = arrays.refined.data ? arrays.refined.as<const float>() : nullptr;
  auto* out_flow = arrays.out_flow.as<float>();
  const auto explain = [&](const float* by, std::vector<std::uint8_t>& into) {
    differences(now, start, by, size, into.data());
    average(into.data(), size, sums.data());
  };
  explain(nullptr, rest);
  explain(flow, moved);
  if (refined != nullptr) {
    explain(refined, other);
  }
  const float right = static_cast<float>(size.width - 1),
              bottom = static_cast<float>(size.height - 1);
  for (std::int64_t i = 0; i < count; ++i) {
    const bool is_refined = refined != nullptr && other[i] <= moved[i];
    const int difference = is_refined ? other[i] : moved[i];
    const bool rests = rest[i] < difference + limits.gain;
    const float* from = (is_refined ? refined : flow) + 2 * i;
    const float dx = rests ? 0.0f : from[0], dy = rests ? 0.0f : from[1];
    out_flow[2 * i] = dx;
    out_flow[2 * i + 1] = dy;
    const float x = static_cast<float>(i % size.width) + dx,
                y = static_cast<float>(i / size.width) + dy;
    const bool is_inside =
        x >= -kOutside && y >= -kOutside && x <= right + kOutside && y <= bottom + kOutside;
    const bool is_lost = std::min<int>(difference, rest[i]) > limits.lost ||
                         (!is_inside && rest[i] > limits.entered);
    places[i] = is_lost ? kLost : rests ? kRests : kMoved;
  }
  return places;
}

// One axis of the labels, in squares: where each one's middle lies in the small frame.
struct Axis {
  Axis(std::int64_t size, std::int64_t small_size, std::int64_t side)
      : scale(static_cast<float>(size) / static_cast<float>(small_size)),
        middle(0.5f * static_cast<float>(side)) {
    for (std::int64_t first = 0; first < size; first += side) {
      middles.push_back(static_cast<float>(first) + middle);
      const float place = middles.back() / scale;
      const Between pixels = between(place - 0.5f, small_size);
      neighbours.push_back(static_cast<std::int32_t>(pixels.first));
      shares.push_back(pixels.share);
      cells.push_back(std::min(static_cast<std::int64_t>(place), small_size - 1));
    }
  }
  std::int64_t num_squares() const { return static_cast<std::int64_t>(cells.size()); }

  float scale, middle;  // pixels of the labels: of a small one, of half a square
  std::vector<float> middles;
  std::vector<std::int32_t> neighbours;  // the small pixel before it; the next one is behind it
  std::vector<float> shares;             // of the next one
  std::vector<std::int64_t> cells;       // the small pixel that it lies in
};

std::int32_t clamped(float place, float last) {
  return static_cast<std::int32_t>(std::min(std::max(0.0f, place), last));
}

template <typename Label>
void move(const MoveLabels& arrays, const MoveLimits& limits) {
  const Size full{arrays.labels.shape[0], arrays.labels.shape[1]};
  const Size small{arrays.start.shape[0], arrays.start.shape[1]};
  const std::vector<std::uint8_t> places = choose(arrays, limits, small);
  const auto* labels = arrays.labels.as<const Label>();
  const auto* flow = arrays.out_flow.as<const float>();
  auto* out = arrays.out.as<Label>();
  const std::int64_t side = std::max(full.height, full.width) > kLarge ? 2 : 1;
  const Axis columns(full.width, small.width, side), rows(full.height, small.height, side);
  const float right = static_cast<float>(full.width - 1);
  const float bottom = static_cast<float>(full.height - 1);
  std::vector<float> dx(small.width + 1), dy(small.width + 1);  // of a row; the end stands twice
  std::vector<std::int32_t> from(columns.num_squares());
  for (std::int64_t row = 0; row < rows.num_squares(); ++row) {
    const std::int64_t y = row * side, lines = std::min(side, full.height - y);
    const std::int64_t above = rows.neighbours[row];
    const std::int64_t below = std::min(above + 1, small.height - 1);
    for (std::int64_t x = 0; x <= small.width; ++x) {
      const std::int64_t column = std::min(x, small.width - 1);
      const float* first = flow + 2 * (above * small.width + column);
      const float* second = flow + 2 * (below * small.width + column);
      dx[x] = columns.scale * lerp(first[0], second[0], rows.shares[row]);
      dy[x] = rows.scale * lerp(first[1], second[1], rows.shares[row]);
    }
    const std::uint8_t* kinds = places.data() + rows.cells[row] * small.width;
    const std::int64_t num_squares = columns.num_squares();
    for (std::int64_t begin = 0, end = 0; begin < num_squares; begin = end) {
      const std::uint8_t kind = kinds[columns.cells[begin]];
      for (end = begin + 1; end < num_squares && kinds[columns.cells[end]] == kind;) {
        ++end;
      }
      const std::int64_t left = begin * side, width = std::min(end * side, full.width) - left;
      Label* to = out + y * full.width + left;
      if (kind == kRests) {
        for (std::int64_t line = 0; line < lines; ++line) {
          std::copy_n(labels + (y + line) * full.width + left, width, to + line * full.width);
        }
        continue;
      }
      if (kind == kLost) {
        std::fill_n(to, width, static_cast<Label>(~Label{0}));
      } else {
        const float* middles = columns.middles.data();
        const float* shares = columns.shares.data();
        const std::int32_t* neighbours = columns.neighbours.data();
        const auto stride = static_cast<std::int32_t>(full.width);
        const auto first = static_cast<std::int32_t>(begin), last = static_cast<std::int32_t>(end);
        std::int32_t* places_from = from.data();
        const float *row_dx = dx.data(), *row_dy = dy.data();
        for (std::int32_t i = first; i < last; ++i) {
          const std::int32_t near = neighbours[i];
          const float x = middles[i] + lerp(row_dx[near], row_dx[near + 1], shares[i]);
          const float down = rows.middles[row] + lerp(row_dy[near], row_dy[near + 1], shares[i]);
          places_from[i] = clamped(down, bottom) * stride + clamped(x, right);
        }
        const std::int64_t whole = width / side;
        if (side == 1) {
          for (std::int64_t i = 0; i < whole; ++i) {
            to[i] = labels[places_from[begin + i]];
          }
        } else {
          for (std::int64_t i = 0; i < whole; ++i) {
            to[2 * i] = to[2 * i + 1] = labels[places_from[begin + i]];
          }
        }
        if (whole * side < width) {  // half a square at the edge
          to[width - 1] = labels[places_from[end - 1]];
        }
      }
      if (lines == 2) {
        std::copy_n(to, width, to + full.width);
      }
    }
  }
}

}  // namespace

// A frame takes 0.3 ms of one thread, which leaves the others to the network.
void move_labels_cpu(const MoveLabels& arrays, const MoveLimits& limits) {
  if (arrays.labels.dtype == DType::uint8) {
    move<std::uint8_t>(arrays, limits);
  } else {
    move<std::uint16_t>(arrays, limits);
  }
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
