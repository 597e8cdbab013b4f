// A CUDA device without a GPU: its memory is the host's, its kernels are the CPU's, its dispatch, its autocast and its
// errors are torch's own for `cuda:0`. What it is for and what it cannot tell: docs/decisions/0100.
//
// Each operation on its tensors that torch has no CUDA kernel for (a CPU build has none) comes to `run_on_host`, which
// lends the CPU's kernel tensors on the same memory. It refuses to mix devices as a GPU does, counts what is held as
// torch's allocator rounds it, and refuses more than a limit.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

Device here() { return Device(DeviceType::CUDA, 0); }

// With EMULATED_CUDA=shapes no operation on `SMALL` bytes or more is computed: what a run of a large model holds is then
// counted in minutes, on a host that could not hold it (docs/decisions/0101).
const bool are_shapes_enough = [] {
  const char* asked = std::getenv("EMULATED_CUDA");
  return asked != nullptr && std::string(asked) == "shapes";
}();
constexpr int64_t SMALL = 1 << 20;

std::atomic<int64_t> held{0}, peak{0}, limit{0};

int64_t round_up(size_t size) { return (static_cast<int64_t>(size) + 511) / 512 * 512; }

void count(int64_t bytes) {
  const int64_t most_allowed = limit.load();
  TORCH_CHECK_WITH(OutOfMemoryError, most_allowed == 0 || held.load() + bytes <= most_allowed,
      "CUDA out of memory. Tried to allocate ", bytes, " bytes of ", most_allowed, " on an emulated device.");
  const int64_t now = held += bytes;
  int64_t most = peak.load();
  while (now > most && !peak.compare_exchange_weak(most, now)) {}
}

// What storages are made with that no kernel of the CPU makes: a checkpoint's, as it is read, and those that nothing is
// computed in. Their pages are zeros that the host does not hold before they are written.
struct Block {
  void* data;
  int64_t size;
};

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &free_block, here()};
    const int64_t rounded = round_up(size);
    count(rounded);
    void* data = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(data != MAP_FAILED, "no address space for ", rounded, " bytes");
    return {data, new Block{data, rounded}, &free_block, here()};
  }
  static void free_block(void* context) {
    auto* block = static_cast<Block*>(context);
    if (block == nullptr) return;
    held -= block->size;
    munmap(block->data, block->size);
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
DeviceAllocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &allocator)

// A storage of the device takes over a CPU tensor that was made for it.
struct Owned {
  at::Tensor tensor;
  int64_t size;
};

void free_owned(void* context) {
  auto* owned = static_cast<Owned*>(context);
  held -= owned->size;
  delete owned;
}

c10::DispatchKeySet keys() { return c10::DispatchKeySet(c10::DispatchKey::CUDA); }

// A tensor of the device as `like` is, on memory of its own.
at::Tensor wrap(const at::Tensor& like, c10::DataPtr data) {
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), like.storage().nbytes(), std::move(data), nullptr, false);
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys(), like.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  return out;
}

at::Tensor unwrap(const at::Tensor& t);

// The same values, or for a tensor without any, its shape.
at::Tensor wrap_new(const at::Tensor& made) {
  if (made.is_meta()) {
    const auto out = wrap(made, allocator.allocate(made.storage().nbytes()));
    const bool is_small = static_cast<int64_t>(made.storage().nbytes()) < SMALL;
    if (is_small) unwrap(out).fill_(1);  // what is asked of values then is neither zero nor infinite: a norm, "are all"
    return out;
  }
  count(round_up(made.storage().nbytes()));
  auto* owned = new Owned{made, round_up(made.storage().nbytes())};
  return wrap(made, c10::DataPtr(const_cast<void*>(made.storage().data()), owned, &free_owned, here()));
}

// A tensor of the device on the storage of another, as `made` lies in it.
at::Tensor wrap_view(const at::Tensor& made, const at::Tensor& of) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(of.storage()), of.key_set(), made.dtype());
  const auto find_offset = [&] {
    const auto* place = static_cast<const char*>(made.const_data_ptr());
    const auto bytes = place - static_cast<const char*>(of.storage().data());
    return bytes / static_cast<int64_t>(made.element_size());
  };
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_storage_offset(made.is_meta() ? made.storage_offset() : find_offset());
  impl->set_sizes_and_strides(made.sizes(), made.strides());
  return out;
}

// A CPU tensor on the memory of one of the device; it holds its storage.
at::Tensor unwrap(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto* held_storage = new c10::Storage(t.storage());
  c10::DataPtr data(const_cast<void*>(t.storage().data()), held_storage,
      [](void* p) { delete static_cast<c10::Storage*>(p); }, Device(DeviceType::CPU));
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_storage_offset(t.storage_offset());
  impl->set_sizes_and_strides(t.sizes(), t.strides());
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}

// The shape of a tensor, for torch's own functions of shapes; a single number of the host keeps its value.
at::Tensor strip(const at::Tensor& t) {
  if (!t.defined() || (!t.is_cuda() && t.dim() == 0)) return t;
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(),
      c10::DataPtr(nullptr, Device(DeviceType::Meta)), c10::GetAllocator(DeviceType::Meta), true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::Meta), t.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_storage_offset(t.storage_offset());
  impl->set_sizes_and_strides(t.sizes(), t.strides());
  return out;
}

// A tensor of the device, and what a kernel of the host is lent in its place.
struct Pair {
  at::Tensor device, lent;
};

// What a GPU refuses: values of both places in one operation, unless the host's is a single number, or indices of what
// is on the device.
void check_places(const std::string& name, const std::vector<at::Tensor>& given) {
  static const std::set<std::string> indexing = {
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  const auto is_on_device = [](const at::Tensor& t) { return t.defined() && t.is_cuda(); };
  if (std::none_of(given.begin(), given.end(), is_on_device)) return;
  if (indexing.count(name) && is_on_device(given.front())) return;
  for (const auto& t : given) {
    TORCH_CHECK(!t.defined() || t.is_cuda() || t.dim() == 0, name,
        ": expected all tensors to be on the same device, found cuda:0 and ", t.device(), " of shape ", t.sizes());
  }
}

// In the place of the arguments on the stack, from `begin`, those that a kernel of `place` takes.
std::vector<Pair> lend(const std::string& name, torch::jit::Stack* stack, size_t begin, DeviceType place) {
  std::vector<Pair> pairs;
  std::vector<at::Tensor> given;
  const auto take = [&](const at::Tensor& t) {
    given.push_back(t);
    at::Tensor lent = place == DeviceType::Meta ? strip(t) : unwrap(t);
    if (t.defined() && t.is_cuda()) pairs.push_back({t, lent});
    return lent;
  };
  for (size_t i = begin; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = take(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> all;
      for (const at::Tensor& t : value.toTensorVector()) all.push_back(take(t));
      value = c10::IValue(all);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> all;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList().vec())
        all.push_back(t.has_value() ? std::optional<at::Tensor>(take(*t)) : std::nullopt);
      value = all;
    } else if (value.isDevice()) {
      value = Device(place);
    }
  }
  check_places(name, given);
  return pairs;
}

// What a kernel has made larger, or of another shape, is so on the device too.
void follow_sizes(const std::vector<Pair>& pairs) {
  for (const auto& pair : pairs) {
    auto* impl = pair.device.unsafeGetTensorImpl();
    const bool is_moved = pair.lent.is_meta() ? pair.lent.storage().nbytes() > pair.device.storage().nbytes()
                                              : pair.lent.storage().data() != pair.device.storage().data();
    if (is_moved && pair.lent.numel() > 0) impl->set_storage_keep_dtype(wrap_new(pair.lent).storage());
    if (pair.lent.sizes() != pair.device.sizes() || pair.lent.strides() != pair.device.strides())
      impl->set_sizes_and_strides(pair.lent.sizes(), pair.lent.strides());
  }
}

// Whether an output lies in the memory that was lent for an argument.
bool is_within(const at::Tensor& made, const Pair& pair) {
  if (made.is_meta()) return made.storage().unsafeGetStorageImpl() == pair.lent.storage().unsafeGetStorageImpl();
  const auto* place = static_cast<const char*>(made.const_data_ptr());
  const auto* from = static_cast<const char*>(pair.device.storage().data());
  return made.numel() > 0 && from != nullptr && place >= from && place < from + pair.device.storage().nbytes();
}

// The tensor of the device that an output is: an argument itself, a view of one, or a new one.
at::Tensor give(const at::Tensor& made, const std::vector<Pair>& pairs) {
  if (!made.defined()) return made;
  for (const auto& pair : pairs)
    if (pair.lent.unsafeGetTensorImpl() == made.unsafeGetTensorImpl()) return pair.device;
  for (const auto& pair : pairs)
    if (is_within(made, pair)) return wrap_view(made, pair.device);
  return wrap_new(made);
}

// In the place of the `count` outputs on the stack those of the device.
void give_all(torch::jit::Stack* stack, size_t count, const std::vector<Pair>& pairs) {
  follow_sizes(pairs);
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = give(value.toTensor(), pairs);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> all;
      for (const at::Tensor& t : value.toTensorVector()) all.push_back(give(t, pairs));
      value = c10::IValue(all);
    }
  }
}

int64_t count_bytes(const torch::jit::Stack& stack) {
  int64_t bytes = 0;
  for (const c10::IValue& value : stack) {
    if (value.isTensor() && value.toTensor().defined()) bytes += value.toTensor().nbytes();
    if (value.isTensorList())
      for (const at::Tensor& t : value.toTensorVector()) bytes += t.nbytes();
  }
  return bytes;
}

// Where only shapes are asked for: the operation on shapes alone, if it is large. One that has no form for shapes, since
// its result depends on values, is not, nor is a view, which touches none.
bool run_on_shapes(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  for (const auto& made : schema.returns())
    if (made.alias_info() != nullptr && !made.alias_info()->isWrite()) return false;
  torch::jit::Stack shapes(stack->end() - schema.arguments().size(), stack->end());
  const auto pairs = lend(schema.name(), &shapes, 0, DeviceType::Meta);
  int64_t bytes = count_bytes(shapes);
  try {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &shapes);
  } catch (const std::exception&) {
    return false;
  }
  bytes += count_bytes(shapes);
  if (bytes < SMALL && schema.name().rfind("aten::empty", 0) != 0) return false;  // what nothing fills stays zero
  give_all(&shapes, schema.returns().size(), pairs);
  torch::jit::drop(*stack, schema.arguments().size());
  stack->insert(stack->end(), shapes.begin(), shapes.end());
  return true;
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (are_shapes_enough && run_on_shapes(op, stack)) return;
  const auto& schema = op.schema();
  const auto pairs = lend(schema.name(), stack, stack->size() - schema.arguments().size(), DeviceType::CPU);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  give_all(stack, schema.returns().size(), pairs);
}

at::Tensor& copy_between(at::Tensor& self, const at::Tensor& other, bool) {
  if (are_shapes_enough && static_cast<int64_t>(self.nbytes()) >= SMALL) return self;
  unwrap(self).copy_(unwrap(other));
  return self;
}

at::Tensor& set_to(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                   c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  std::vector<int64_t> sizes, strides;
  int64_t step = 1;
  for (const auto& s : size) sizes.push_back(s.expect_int());
  for (const auto& s : stride) strides.push_back(s.expect_int());
  if (strides.size() != sizes.size()) {
    strides.assign(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 0; step *= sizes[i]) strides[i] = step;
  }
  impl->set_sizes_and_strides(sizes, strides);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_to(self, std::move(source), 0, std::vector<c10::SymInt>{size}, std::vector<c10::SymInt>{1});
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream stream() { return Stream(Stream::DEFAULT, here()); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int = 0) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", &copy_between);
  m.impl("set_.source_Storage_storage_offset", &set_to);
  m.impl("set_.source_Storage", &set_whole);
}

}  // namespace

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

extern "C" {
int64_t device_held() { return held.load(); }
int64_t device_peak() { return peak.load(); }
void device_reset_peak() { peak.store(held.load()); }
void device_limit(int64_t bytes) { limit.store(bytes); }
}
