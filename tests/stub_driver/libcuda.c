/* The part of CUDA's driver that Triton calls, for a machine without a GPU: every call succeeds and does nothing, and launches are
 * counted. The attributes are an H100's (values of CUdevice_attribute in cuda.h). */
#include <stddef.h>
#include <stdint.h>

typedef int Result; /* CUresult; 0 is CUDA_SUCCESS */

static long launches;
long stub_launches(void) { return launches; }

Result cuInit(unsigned flags) { return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "the stub driver has no errors"; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 8: *value = 49152; break;   /* MAX_SHARED_MEMORY_PER_BLOCK */
    case 10: *value = 32; break;     /* WARP_SIZE */
    case 12: *value = 65536; break;  /* MAX_REGISTERS_PER_BLOCK */
    case 16: *value = 132; break;    /* MULTIPROCESSOR_COUNT */
    case 75: *value = 9; break;      /* COMPUTE_CAPABILITY_MAJOR */
    case 76: *value = 0; break;      /* COMPUTE_CAPABILITY_MINOR */
    case 81: *value = 233472; break; /* MAX_SHARED_MEMORY_PER_MULTIPROCESSOR */
    case 82: *value = 65536; break;  /* MAX_REGISTERS_PER_MULTIPROCESSOR */
    case 97: *value = 232448; break; /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
    default: *value = 1024;
    }
    return 0;
}

Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : 0; /* MAX_THREADS_PER_BLOCK; sizes, registers and local memory are unknown */
    return 0;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }

/* Triton asks for CU_POINTER_ATTRIBUTE_DEVICE_POINTER: memory of the CPU stands for the GPU's. */
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }

Result cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
    launches++;
    return 0;
}
