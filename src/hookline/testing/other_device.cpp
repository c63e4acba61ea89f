// A device of another type for torch: its memory is the CPU's, and its kernels are those of the CPU.
//
// The dispatcher, autograd, autocast and `torch.accelerator` know it as they know the device of a vendor, by the key
// PrivateUse1. It refuses what a real device refuses: tensors of two devices, and random numbers of another device.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/ScopeExit.h>
#include <torch/library.h>

namespace {

using at::IntArrayRef;
using at::Scalar;
using at::ScalarType;
using at::Tensor;
template <class T>
using maybe = std::optional<T>;

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, DEVICE);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// What torch asks of a device: memory, where work goes, and what there is ------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &c10::free_cpu;
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(TYPE, &memory);

// One device with one stream, on which all is done at once.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  c10::Device exchangeDevice(c10::Device) const override {
    return DEVICE;
  }
  c10::Device getDevice() const override {
    return DEVICE;
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return STREAM;
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return STREAM;
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return STREAM;
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return at::getCPUAllocator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// Tensors: making, viewing, copying ---------------------------------------------------------------------------------

void refuse_second(maybe<at::Device> device) {
  TORCH_CHECK(!device || device->index() <= 0, "there is one device of this type, ", DEVICE, ", and no ", *device);
}

Tensor empty(IntArrayRef size, maybe<ScalarType> dtype, maybe<at::Layout>, maybe<at::Device> device, maybe<bool>,
             maybe<at::MemoryFormat> format) {
  refuse_second(device);
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, maybe<ScalarType> dtype, maybe<at::Layout>,
                     maybe<at::Device> device, maybe<bool>) {
  refuse_second(device);
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

// The same memory, as the CPU sees it.
Tensor seen(const Tensor& tensor) {
  if (!tensor.is_privateuseone()) {
    return tensor;
  }
  auto same = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  same._set_conj(tensor.is_conj());
  same._set_neg(tensor.is_neg());
  return same;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  seen(target).copy_(seen(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

// All else is done by the CPU ---------------------------------------------------------------------------------------

const at::Generator& own_random() {
  static const at::Generator generator = at::detail::createCPUGenerator();
  return generator;
}

void refuse_elsewhere(const c10::OperatorHandle& op, const Tensor& tensor) {
  TORCH_CHECK(!tensor.defined() || tensor.is_privateuseone(), "Expected all tensors to be on the same device, but ",
              "found at least two devices, ", DEVICE, " and ", tensor.device(), "! (in ", op.schema().name(), ")");
}

void refuse_foreign(const c10::OperatorHandle& op, const c10::Argument& argument, const c10::IValue& value) {
  TORCH_CHECK(!value.isGenerator(), "Expected a '", DEVICE.type(), "' device type for generator but found 'cpu' (in ",
              op.schema().name(), ")");
  if (value.isTensorList()) {  // those of an index are optional ones, and may be on the CPU
    for (const Tensor& tensor : value.toTensorVector()) {
      refuse_elsewhere(op, tensor);
    }
  } else if (value.isTensor() && value.toTensor().defined()) {
    bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (written || value.toTensor().dim() > 0) {  // a number on the CPU may be read everywhere, as with a real device
      refuse_elsewhere(op, value.toTensor());
    }
  }
}

void call_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  const auto& returns = op.schema().returns();
  for (size_t index = 0; index < returns.size(); index++) {  // are where the first tensor is, which may be a number
    auto& value = torch::jit::peek(*stack, index, returns.size());
    if (!returns[index].alias_info() && value.isTensor() && value.toTensor().defined()) {
      value = value.toTensor().to(DEVICE);
    }
  }
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  for (size_t index = 0; index < arguments.size(); index++) {
    refuse_foreign(op, arguments[index], torch::jit::peek(*stack, index, arguments.size()));
  }
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) {
    return call_cpu(op, stack);
  }
  auto random = at::detail::getDefaultCPUGenerator();
  auto before = random.get_state();
  random.set_state(own_random().get_state());
  auto after = c10::make_scope_exit([&] {
    auto own = own_random();
    own.set_state(random.get_state());
    random.set_state(before);
  });
  call_cpu(op, stack);
}

maybe<Tensor> seen(const maybe<Tensor>& tensor) {
  return tensor && tensor->defined() ? maybe<Tensor>(seen(*tensor)) : std::nullopt;
}

// It says nowhere that it changes the running statistics, so `cpu_fallback` would lose what it does to a copy of them.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const maybe<Tensor>& weight,
                                              const maybe<Tensor>& bias, const maybe<Tensor>& mean,
                                              const maybe<Tensor>& variance, bool training, double momentum,
                                              double epsilon) {
  auto [output, used, inverse] = at::native_batch_norm(seen(input), seen(weight), seen(bias), seen(mean),
                                                       seen(variance), training, momentum, epsilon);
  return {output.to(DEVICE), used.to(DEVICE), inverse.to(DEVICE)};
}

Tensor get_rng_state() {
  return own_random().get_state();
}

void set_rng_state(const Tensor& state) {
  auto own = own_random();
  own.set_state(state);
}

} // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  // torch would do these by their variant with `out`, whose result the CPU resizes, with a warning.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto key = c10::DispatchKey::CompositeExplicitAutogradNonFunctional;
    if (name.getNamespace() == "aten" && dispatcher.findOp(name)->hasKernelForDispatchKey(key)) {
      m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
    }
  }
  m.impl("native_batch_norm", batch_norm);
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
}

TORCH_LIBRARY(hookline_other, m) {
  m.def("get_rng_state", get_rng_state);
  m.def("set_rng_state", set_rng_state);
}

// Autocast, by torch's own lists of what runs in which precision ----------------------------------------------------

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_OUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_OUT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST)
}
