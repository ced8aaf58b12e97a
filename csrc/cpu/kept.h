// Values that are kept from call to call for as long as what they were made of stays the same.
#pragma once

#include <cstdint>
#include <iterator>
#include <list>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fusedrnn {

// A place has at most one value. It is given out only to who shows the fingerprint it was kept under. Together they
// take at most `limit` bytes: those that were not asked for the longest make room. Any number of threads may call.
template <class Value>
class Kept {
 public:
  using Place = std::vector<intptr_t>;
  using Fingerprint = std::vector<uint64_t>;

  explicit Kept(int64_t limit) : limit_(limit) {}

  std::optional<Value> find(const Place& place, const Fingerprint& fingerprint) {
    const std::lock_guard lock(mutex_);
    const auto found = at(place);
    if (found == entries_.end() || found->fingerprint != fingerprint) return std::nullopt;
    entries_.splice(entries_.begin(), entries_, found);
    return found->value;
  }

  void keep(Place place, Fingerprint fingerprint, Value value, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    if (const auto found = at(place); found != entries_.end()) drop(found);
    entries_.push_front({std::move(place), std::move(fingerprint), std::move(value), bytes});
    bytes_ += bytes;
    make_room();
  }

  int64_t limit() const {
    const std::lock_guard lock(mutex_);
    return limit_;
  }
  void set_limit(int64_t limit) {
    const std::lock_guard lock(mutex_);
    limit_ = limit;
    make_room();
  }
  int64_t bytes() const {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

 private:
  struct Entry {
    Place place;
    Fingerprint fingerprint;
    Value value;
    int64_t bytes;
  };
  using Entries = std::list<Entry>;

  typename Entries::iterator at(const Place& place) {
    auto entry = entries_.begin();
    while (entry != entries_.end() && entry->place != place) ++entry;
    return entry;
  }

  void drop(typename Entries::iterator entry) {
    bytes_ -= entry->bytes;
    entries_.erase(entry);
  }

  void make_room() {
    while (bytes_ > limit_) drop(std::prev(entries_.end()));
  }

  mutable std::mutex mutex_;
  int64_t limit_, bytes_ = 0;
  Entries entries_;  // the one that was asked for last comes first
};

}  // namespace fusedrnn
