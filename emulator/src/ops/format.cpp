// Changes of storage format.
#include "operator.h"

namespace cann {
void recast(const TensorArgument& source, const TensorArgument& target) {
    const Tensor logical = source.read();
    Tensor stored = at::from_blob(target.data, is_private(target.format) ? target.storage_sizes : target.sizes, target.dtype);
    move(stored, is_private(target.format) ? pack(logical, target.format) : logical);
}
}  // namespace cann

ACLNN(NpuFormatCast, (Stored src, Stored dst) { recast(*src.argument, *dst.argument); })

// One phase only; the caller frees `*sizes` with delete[].
CANN_API int aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor* src, int format, int, int64_t** sizes, uint64_t* rank,
                                                      int* actual_format) {
    try {
        const auto stored = cann::private_sizes(src->argument->sizes, format, src->argument->dtype);
        *sizes = new int64_t[stored.size()];
        std::copy(stored.begin(), stored.end(), *sizes);
        *rank = stored.size();
        *actual_format = format;
        return 0;
    } catch (const std::exception& error) {
        return cann::fail_plan("NpuFormatCastCalculateSizeAndFormat", error);
    }
}
