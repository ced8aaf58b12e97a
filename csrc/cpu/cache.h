// Caches that live from call to call, bounded by bytes.
#pragma once

#include <cstdint>
#include <iterator>
#include <list>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fusedrnn {

// LRU list of items, bounded by the sum of their `bytes`: the least recently used are evicted. Thread-safe; derived
// classes lock the mutex around accesses to the items.
template <class Item>
class ByteLru {
 public:
  explicit ByteLru(int64_t limit) : limit_(limit) {}

  int64_t limit() const {
    const std::lock_guard lock(mutex_);
    return limit_;
  }
  void set_limit(int64_t limit) {
    const std::lock_guard lock(mutex_);
    limit_ = limit;
    evict();
  }
  int64_t bytes() const {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

  // For fork handlers: a child has no other threads, and would deadlock on a mutex that one of them holds.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 protected:
  using Items = std::list<Item>;

  void put(Item item) {
    bytes_ += item.bytes;
    items_.push_front(std::move(item));
    evict();
  }

  Item take_out(typename Items::iterator at) {
    Item item = std::move(*at);
    bytes_ -= item.bytes;
    items_.erase(at);
    return item;
  }

  mutable std::mutex mutex_;
  Items items_;

 private:
  void evict() {
    while (bytes_ > limit_) take_out(std::prev(items_.end()));
  }

  int64_t limit_, bytes_ = 0;
};

// place: addresses and sizes of the sources of the value; fingerprint: of their contents.
template <class Value>
struct CacheEntry {
  std::vector<intptr_t> place;
  std::vector<uint64_t> fingerprint;
  Value value;
  int64_t bytes;
};

// Values cached by place, at most one for each; a lookup with another fingerprint is a miss.
template <class Value>
class Cache : public ByteLru<CacheEntry<Value>> {
 public:
  using Item = CacheEntry<Value>;
  using ByteLru<Item>::ByteLru;

  std::optional<Value> find(const std::vector<intptr_t>& place, const std::vector<uint64_t>& fingerprint) {
    const std::lock_guard lock(this->mutex_);
    const auto found = at(place);
    if (found == this->items_.end() || found->fingerprint != fingerprint) return std::nullopt;
    this->items_.splice(this->items_.begin(), this->items_, found);
    return found->value;
  }

  void keep(Item item) {
    const std::lock_guard lock(this->mutex_);
    if (const auto found = at(item.place); found != this->items_.end()) this->take_out(found);
    this->put(std::move(item));
  }

 private:
  auto at(const std::vector<intptr_t>& place) {
    auto item = this->items_.begin();
    while (item != this->items_.end() && item->place != place) ++item;
    return item;
  }
};

}  // namespace fusedrnn
