// Which tensors of a step share memory. A launch updates many parameters at once, in no order; parameters that overlap
// must be updated one after the other.
#pragma once
#include <c10/core/Allocator.h>

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace {

struct Range {
  const char *begin = nullptr, *end = nullptr;
  bool is_float() const { return end - begin == sizeof(float); }  // and not double
  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

// Whether nothing else can lie in the memory of a tensor: torch allocated it, and only the caller holds the tensor.
bool is_sole_owner(c10::TensorImpl* t) {
  const auto& storage = t->storage();
  return c10::raw::intrusive_ptr::use_count(t) == 1 && storage.use_count() == 1 &&
         storage.allocator() == c10::GetAllocator(t->device().type());
}

// The memory of the first `elements` of a tensor. Memory that is only read stays shared with lazy clones.
[[gnu::always_inline]] inline Range range(const c10::TensorImpl* t, int64_t elements, int64_t itemsize,
                                          bool only_read) {
  if (!elements) return {};
  auto* storage = t->storage().unsafeGetStorageImpl();
  const auto* data = static_cast<const char*>(only_read ? storage->data() : storage->mutable_data());
  data += t->storage_offset() * itemsize;
  return {data, data + elements * itemsize};
}

enum Sharing : uint8_t {
  kInTurn = 1,    // with another parameter, its state or its gradient
  kCounted = 2,   // two parameters have one step count
  kCopied = 4,    // its own update writes to its gradient
  // A launch would do something else than torch's loop over parameters.
  kOwnState = 8,
  kCounts = 16,
  kEager = 32,
};
constexpr uint8_t kRefused = kOwnState | kCounts | kEager;

// Off the host gradients are not copied, and counts that lie there are all advanced at once.
uint8_t refused_sharing(bool off_host, bool counts_off_host) {
  return kRefused | (off_host ? kCopied : 0) | (counts_off_host ? kCounted : 0);
}

// Where the tensors of all parameters were last seen. They are compared again only after one that is written has moved.
// A gradient that has moved, and may share its memory, is looked up among the ranges that are written: 3 us for 100.
class Memory {
 public:
  enum Cell : size_t { kGradient, kParam, kCounts0 };  // then the other counts, and the buffers

  Memory() = default;
  Memory(std::vector<bool> eager, size_t slots, size_t counts)
      : eager_(std::move(eager)), cells_(kCounts0 + slots), counts_(counts) {
    ranges_.resize(eager_.size() * cells_);
    sharing_.resize(eager_.size());
  }

  // `owned`: whether no other tensor can lie there.
  void note(size_t entry, size_t cell, Range now, bool owned = false) {
    Range& last = ranges_[entry * cells_ + cell];
    if (now == last) return;
    last = now;
    stale_ = stale_ || shared_ || cell != kGradient || (!owned && is_written(now));
  }
  Range at(size_t entry, size_t cell) const { return ranges_[entry * cells_ + cell]; }
  char* address(size_t entry, size_t cell) const { return const_cast<char*>(at(entry, cell).begin); }
  // Forgets the gradient of a parameter that has none now: another tensor may lie there next.
  void skip(size_t entry) { ranges_[entry * cells_] = {}; }

  void make_eager(size_t entry) {
    eager_[entry] = true;
    stale_ = true;
  }
  bool is_eager(size_t entry) const { return eager_[entry]; }

  // What each parameter shares, as bits of `Sharing`. Call it after all ranges of a step were noted.
  const std::vector<uint8_t>& sharing() {
    if (stale_) compare();
    stale_ = false;
    return sharing_;
  }

 private:
  struct Located {
    Range range;
    size_t entry, cell;
  };

  bool is_written(Range range) const {  // `written_` does not overlap, or `shared_` is set
    auto after = std::lower_bound(written_.begin(), written_.end(), range.end,
                                  [](const Range& r, const char* end) { return r.begin < end; });
    return after != written_.begin() && std::prev(after)->end > range.begin;
  }

  void compare() {
    std::vector<Located> located;
    for (size_t i = 0; i < ranges_.size(); i++)
      if (ranges_[i].begin != ranges_[i].end) located.push_back({ranges_[i], i / cells_, i % cells_});
    std::sort(located.begin(), located.end(),
              [](const Located& a, const Located& b) { return a.range.begin < b.range.begin; });
    std::fill(sharing_.begin(), sharing_.end(), 0);
    written_.clear();
    shared_ = false;
    for (size_t i = 0; i < located.size(); i++) {
      if (located[i].cell != kGradient) written_.push_back(located[i].range);
      for (size_t j = i + 1; j < located.size() && located[j].range.begin < located[i].range.end; j++)
        if (located[i].cell != kGradient || located[j].cell != kGradient) share(located[i], located[j]);
    }
  }

  bool is_count(const Located& p) const { return p.cell >= kCounts0 && p.cell < kCounts0 + counts_; }

  void share(const Located& a, const Located& b) {
    shared_ = true;
    uint8_t both = kInTurn;
    if (a.entry == b.entry)
      both = a.cell == kGradient || b.cell == kGradient ? kCopied : kOwnState;
    else if (eager_[a.entry] || eager_[b.entry])
      both = kEager;
    else if (a.cell == kCounts0 && b.cell == kCounts0 && counts_ && a.range == b.range)
      both = kCounted;
    else if (is_count(a) || is_count(b))
      both = kCounts;
    sharing_[a.entry] |= both;
    sharing_[b.entry] |= both;
  }

  std::vector<bool> eager_;       // [entry]: updated without a kernel, after the launch
  size_t cells_ = 0, counts_ = 0;
  std::vector<Range> ranges_;     // [entry][cell]
  std::vector<Range> written_;    // by address
  std::vector<uint8_t> sharing_;  // [entry]
  bool stale_ = true, shared_ = false;
};

const char* why_refused(uint8_t sharing) {
  if (sharing & kOwnState) return "its memory is also that of its own state";
  if (sharing & kCounts) return "its step count, or what is carried beside it, is also the memory of another parameter";
  if (sharing & kEager) return "it shares memory with a parameter that is updated eagerly";
  if (sharing & kCopied) return "its update writes to its gradient, and only gradients in host memory are copied first";
  return "its step count is also that of another parameter, and only counts in host memory advance one after the other";
}

}  // namespace
