/* A stand-in for the CUDA driver of a machine without a GPU, for ../cuda_compiles.sh: it says that there is a device of
 * compute capability 9.0, keeps its memory in that of the host, copies between them, writes down every module that it is
 * given, and launches nothing. So a program gets to all kernels that it would launch, with wrong numbers.
 *
 * A number that is read alone is 2^20: what nexus::device expects of a device that adds so many ones, and for a training
 * run a loss and a norm that are finite. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef unsigned long long Device;

static const size_t MEMORY = (size_t)32 << 30;
static const size_t PAGE = 4096;
static int modules;

/* What it answers by doing nothing. */
#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSynchronize)
NOTHING(cuStreamDestroy_v2)
NOTHING(cuStreamSynchronize)
NOTHING(cuStreamQuery)
NOTHING(cuStreamWaitEvent)
NOTHING(cuEventDestroy_v2)
NOTHING(cuEventRecord)
NOTHING(cuEventSynchronize)
NOTHING(cuEventQuery)
NOTHING(cuFuncSetAttribute)
NOTHING(cuLaunchKernel)
NOTHING(cuLaunchKernelEx)
NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeIm2colWide)

/* Handles that nobody looks into. */
#define HANDLE(name) int name(void **handle) { *handle = (void *)PAGE; return 0; }
HANDLE(cuDevicePrimaryCtxRetain)
HANDLE(cuStreamCreate)
HANDLE(cuStreamCreateWithPriority)
HANDLE(cuEventCreate)
HANDLE(cuModuleGetFunction)

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index == 0 ? 0 : 101; }
int cuDeviceGetName(char *name, int len) { snprintf(name, len, "no GPU"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes) { *bytes = MEMORY; return 0; }
int cuDeviceGetPCIBusId(char *id, int len) { snprintf(id, len, "0000:00:00.0"); return 0; }
int cuDeviceGetUuid_v2(void *id) { memset(id, 0, 16); return 0; }
int cuMemGetInfo_v2(size_t *available, size_t *total) { *available = *total = MEMORY; return 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cuEventElapsedTime_v2(float *milliseconds) { *milliseconds = 1; return 0; }
int cuGetErrorName(int error, const char **name) { *name = "CUDA_ERROR"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the stand-in"; return 0; }

/* Of an H100. */
int cuDeviceGetAttribute(int *value, int attribute) {
    switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break; /* threads of a block, along x and y */
    case 4: *value = 64; break;                   /* along z */
    case 5: *value = 0x7fffffff; break;           /* blocks along x */
    case 6: case 7: *value = 65535; break;        /* along y and z */
    case 8: *value = 49152; break;                /* bytes of shared memory */
    case 10: *value = 32; break;                  /* threads of a warp */
    case 16: *value = 132; break;                 /* multiprocessors */
    case 75: *value = 9; break;                   /* compute capability */
    case 76: *value = 0; break;
    case 97: *value = 232448; break;              /* bytes of shared memory if asked for */
    default: *value = 1;
    }
    return 0;
}

/* A page before each allocation has its size. Nothing is taken from the system before it is touched. */
int cuMemAlloc_v2(Device *memory, size_t bytes) {
    size_t *pages = mmap(0, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) return 2;
    *pages = bytes + PAGE;
    *memory = (Device)pages + PAGE;
    return 0;
}
int cuMemAllocAsync(Device *memory, size_t bytes) { return cuMemAlloc_v2(memory, bytes); }
int cuMemFree_v2(Device memory) {
    size_t *pages = (size_t *)(memory - PAGE);
    return memory ? munmap(pages, *pages) : 0;
}
int cuMemFreeAsync(Device memory) { return cuMemFree_v2(memory); }
int cuMemAllocHost_v2(void **memory, size_t bytes) { *memory = malloc(bytes); return 0; }
int cuMemFreeHost(void *memory) { free(memory); return 0; }

static void read_back(void *to, const void *from, size_t bytes) {
    const float alone = 1 << 20;
    memcpy(to, bytes == sizeof alone ? &alone : from, bytes);
}
int cuMemcpyHtoDAsync_v2(Device to, const void *from, size_t bytes) { memcpy((void *)to, from, bytes); return 0; }
int cuMemcpyDtoHAsync_v2(void *to, Device from, size_t bytes) { read_back(to, (void *)from, bytes); return 0; }
int cuMemcpyDtoDAsync_v2(Device to, Device from, size_t bytes) { memmove((void *)to, (void *)from, bytes); return 0; }

typedef struct {
    size_t x, y;
    int kind; /* 1: of the host */
    char *host, *device;
    void *array;
    size_t pitch;
} Side;
typedef struct { Side from, to; size_t bytes, rows; } Copy;

static char *start(const Side *side) {
    return (side->kind == 1 ? side->host : side->device) + side->y * side->pitch + side->x;
}
int cuMemcpy2DAsync_v2(const Copy *copy) {
    for (size_t row = 0; row < copy->rows; row++) {
        char *to = start(&copy->to) + row * copy->to.pitch, *from = start(&copy->from) + row * copy->from.pitch;
        if (copy->to.kind == 1 && copy->rows == 1) read_back(to, from, copy->bytes);
        else memcpy(to, from, copy->bytes);
    }
    return 0;
}

/* Modules are text in PTX. */
int cuModuleLoadData(void **module, const char *text) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%d-%d.ptx", getenv("MODULES"), getpid(), modules++);
    FILE *file = fopen(path, "w");
    if (!file) return 999;
    fputs(text, file);
    fclose(file);
    *module = (void *)PAGE;
    return 0;
}
