// A stand-in for NVIDIA's driver, `libcuda.so`: the functions of its C interface that `apr` calls, over the emulation.
//
// It is stricter than the driver where that finds mistakes. Work on a stream is not done before somebody waits for it, so what a
// copy reads or writes has to live until then. Every call needs a current context, nothing but launches goes into a graph, what may
// still run is not destroyed, and a context that is let go of with anything left in it says so. Where a rule is broken the call
// fails and a line that begins with "emulated driver:" goes to standard error.
//
// Meaning of functions and errors: NVIDIA's manual of the driver API. From the environment:
//   EMULATED_GPU_BYTES     device memory, 16 GiB where it says nothing
//   EMULATED_GPU_LAUNCHES  after so many kernels the device is lost, as after one that wrote where it may not

#include <elf.h>
#include <sys/types.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

extern "C" int apr_emulation_launch(const char *name, const uint32_t *grid, uint32_t threads, const uint64_t *args,
                                    const char *kinds, uint32_t kind_of_order, uint64_t seed, char *error, size_t error_bytes);
extern "C" const char *apr_emulation_kinds(const char *name);
extern "C" void *apr_emulation_alloc(size_t bytes);
extern "C" void apr_emulation_free(void *at, size_t bytes);

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
};

// What the device says it is.
const char NAME[] = "Emulated GPU";
const int MAJOR = 9, MINOR = 0, N_SM = 2, DRIVER_VERSION = 13000;

struct Function {
    std::string name, kinds;
};

struct Module {
    std::set<std::string> kernels;
    std::map<std::string, Function *> functions;
};

// A launch or a copy that is yet to be done.
struct Work {
    Function *function;
    uint32_t grid[3], threads;
    std::vector<uint64_t> args;
    void *to;
    const void *from;
    size_t n_bytes;
};

struct Graph {
    std::vector<Work> launches;
};

struct Stream {
    std::vector<Work> queue;
    Graph *capture;
    bool is_invalidated;
};

struct Context {
    int n_users;
    std::map<uint64_t, size_t> memory;
    std::set<Module *> modules;
    std::set<Stream *> streams;
    std::set<Graph *> graphs, execs;
    // Of graphs that have been launched and not been waited for.
    std::set<Graph *> in_flight;
    size_t n_used;
    uint64_t n_launches;
    bool is_lost;
};

std::mutex mutex;
bool is_initialised = false;
Context context;
thread_local Context *current = nullptr;

uint64_t from_environment(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}

Result misuse(Result result, const std::string &what) {
    fprintf(stderr, "emulated driver: %s\n", what.c_str());
    return result;
}

// Held by every call; `result` says whether it may go on.
struct Call {
    std::lock_guard<std::mutex> guard;
    Result result;

    explicit Call(const char *name) : guard(mutex), result(SUCCESS) {
        if (!is_initialised) result = misuse(NOT_INITIALIZED, std::string(name) + " before cuInit");
        else if (current != &context || !context.n_users) result = misuse(INVALID_CONTEXT, std::string(name) + " without a context");
        else if (context.is_lost) result = ILLEGAL_ADDRESS;
    }

    // A call that a stream which records does not allow, on whatever stream it is.
    Call(const char *name, bool) : Call(name) {
        for (Stream *s : context.streams)
            if (result == SUCCESS && s->capture) {
                s->is_invalidated = true;
                result = misuse(STREAM_CAPTURE_UNSUPPORTED, std::string(name) + " while a graph is recorded");
            }
    }
};

Result run(const Work &work) {
    if (!work.function) {
        memcpy(work.to, work.from, work.n_bytes);
        return SUCCESS;
    }
    if (context.n_launches++ >= from_environment("EMULATED_GPU_LAUNCHES", UINT64_MAX)) {
        context.is_lost = true;
        return ILLEGAL_ADDRESS;
    }
    char error[256];
    const Function &f = *work.function;
    if (!apr_emulation_launch(f.name.c_str(), work.grid, work.threads, work.args.data(), f.kinds.c_str(), 0, 0, error, sizeof error))
        return SUCCESS;
    context.is_lost = true;
    return misuse(ILLEGAL_ADDRESS, "kernel " + f.name + ": " + error);
}

Result finish(Stream *stream) {
    std::vector<Work> queue;
    queue.swap(stream->queue);
    context.in_flight.clear();
    for (const Work &work : queue) {
        const Result result = run(work);
        if (result != SUCCESS) return result;
    }
    return SUCCESS;
}

// Whether memory of the device has these bytes.
bool has(uint64_t at, size_t n_bytes) {
    auto after = context.memory.upper_bound(at);
    if (after == context.memory.begin()) return false;
    const auto &found = *--after;
    return at - found.first <= found.second && n_bytes <= found.second - (at - found.first);
}

Result copy(const char *name, void *to, const void *from, uint64_t device, size_t n_bytes, Stream *stream) {
    Call call(name, true);
    if (call.result != SUCCESS) return call.result;
    if (!context.streams.count(stream)) return misuse(INVALID_HANDLE, std::string(name) + " on no stream");
    if (!has(device, n_bytes)) return misuse(INVALID_VALUE, std::string(name) + " past the end of memory");
    Work work = {};
    work.to = to, work.from = from, work.n_bytes = n_bytes;
    stream->queue.push_back(work);
    return SUCCESS;
}

// Names of the functions that machine code defines.
Result read_image(const uint8_t *image, std::set<std::string> &names) {
    const Elf64_Ehdr &head = *(const Elf64_Ehdr *)image;
    const Elf64_Half EM_OF_CUDA = 190;
    if (memcmp(head.e_ident, ELFMAG, SELFMAG) || head.e_machine != EM_OF_CUDA)
        return misuse(INVALID_IMAGE, "a module that is no machine code of a GPU");
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head.e_shoff);
    for (int i = 0; i < head.e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const char *strings = (const char *)image + sections[sections[i].sh_link].sh_offset;
        const Elf64_Sym *symbols = (const Elf64_Sym *)(image + sections[i].sh_offset);
        for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; s++)
            if (ELF64_ST_TYPE(symbols[s].st_info) == STT_FUNC && symbols[s].st_shndx != SHN_UNDEF)
                names.insert(strings + symbols[s].st_name);
    }
    return SUCCESS;
}

const struct {
    Result result;
    const char *name, *text;
} ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
};

} // namespace

extern "C" {

Result cuGetErrorName(Result error, const char **name) {
    for (const auto &e : ERRORS)
        if (e.result == error) return *name = e.name, SUCCESS;
    return *name = nullptr, INVALID_VALUE;
}

Result cuGetErrorString(Result error, const char **text) {
    for (const auto &e : ERRORS)
        if (e.result == error) return *text = e.text, SUCCESS;
    return *text = nullptr, INVALID_VALUE;
}

Result cuInit(unsigned flags) {
    std::lock_guard<std::mutex> guard(mutex);
    is_initialised = true;
    return flags ? INVALID_VALUE : SUCCESS;
}

Result cuDriverGetVersion(int *version) { return *version = DRIVER_VERSION, SUCCESS; }

// Asked for before there is a context.
Result cuDeviceGetCount(int *n) { return *n = 1, is_initialised ? SUCCESS : NOT_INITIALIZED; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_DEVICE; }

Result cuDeviceGetName(char *name, int room, int device) {
    snprintf(name, room, "%s", NAME);
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

Result cuDeviceTotalMem_v2(size_t *n_bytes, int device) {
    *n_bytes = from_environment("EMULATED_GPU_BYTES", 1ull << 34);
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    const int MULTIPROCESSOR_COUNT = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76;
    if (device != 0) return INVALID_DEVICE;
    if (attribute == MULTIPROCESSOR_COUNT) *value = N_SM;
    else if (attribute == CAPABILITY_MAJOR) *value = MAJOR;
    else if (attribute == CAPABILITY_MINOR) *value = MINOR;
    else return misuse(INVALID_VALUE, "an attribute that it does not know");
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(Context **out, int device) {
    std::lock_guard<std::mutex> guard(mutex);
    if (device != 0) return INVALID_DEVICE;
    context.n_users++;
    *out = &context;
    return SUCCESS;
}

Result cuDevicePrimaryCtxRelease_v2(int device) {
    std::lock_guard<std::mutex> guard(mutex);
    if (device != 0 || !context.n_users) return misuse(INVALID_CONTEXT, "a context is let go of that nobody holds");
    const Context &c = context;
    const size_t n_left = c.memory.size() + c.modules.size() + c.streams.size() + c.graphs.size() + c.execs.size();
    if (--context.n_users == 0 && n_left && !c.is_lost)
        misuse(SUCCESS, std::to_string(c.memory.size()) + " buffers, " + std::to_string(c.modules.size()) + " modules, " +
                            std::to_string(c.streams.size()) + " streams and " + std::to_string(c.graphs.size() + c.execs.size()) +
                            " graphs are left in a context that is let go of");
    return SUCCESS;
}

Result cuCtxSetCurrent(Context *c) {
    if (c != &context) return misuse(INVALID_CONTEXT, "a context that does not exist");
    current = c;
    return SUCCESS;
}

Result cuMemGetInfo_v2(size_t *free, size_t *total) {
    Call call("cuMemGetInfo");
    if (call.result != SUCCESS) return call.result;
    cuDeviceTotalMem_v2(total, 0);
    *free = *total > context.n_used ? *total - context.n_used : 0;
    return SUCCESS;
}

Result cuMemAlloc_v2(uint64_t *at, size_t n_bytes) {
    Call call("cuMemAlloc", true);
    if (call.result != SUCCESS) return call.result;
    if (n_bytes == 0) return misuse(INVALID_VALUE, "cuMemAlloc of nothing");
    size_t total;
    cuDeviceTotalMem_v2(&total, 0);
    void *memory = context.n_used + n_bytes > total ? nullptr : apr_emulation_alloc(n_bytes);
    if (!memory) return OUT_OF_MEMORY;
    context.memory[(uint64_t)memory] = n_bytes;
    context.n_used += n_bytes;
    *at = (uint64_t)memory;
    return SUCCESS;
}

// The driver waits for all work first.
Result cuMemFree_v2(uint64_t at) {
    Call call("cuMemFree", true);
    if (call.result != SUCCESS) return call.result;
    auto found = context.memory.find(at);
    if (found == context.memory.end()) return misuse(INVALID_VALUE, "cuMemFree of what is no buffer");
    Result result = SUCCESS;
    for (Stream *s : context.streams)
        if (result == SUCCESS) result = finish(s);
    apr_emulation_free((void *)at, found->second);
    context.n_used -= found->second;
    context.memory.erase(found);
    return result;
}

Result cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n_bytes, Stream *stream) {
    return copy("cuMemcpyHtoDAsync", (void *)to, from, to, n_bytes, stream);
}

Result cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n_bytes, Stream *stream) {
    return copy("cuMemcpyDtoHAsync", to, (const void *)from, from, n_bytes, stream);
}

Result cuModuleLoadData(Module **out, const void *image) {
    Call call("cuModuleLoadData", true);
    if (call.result != SUCCESS) return call.result;
    Module *module = new Module();
    const Result result = read_image((const uint8_t *)image, module->kernels);
    if (result != SUCCESS) return delete module, result;
    context.modules.insert(*out = module);
    return SUCCESS;
}

Result cuModuleGetFunction(Function **out, Module *module, const char *name) {
    Call call("cuModuleGetFunction");
    if (call.result != SUCCESS) return call.result;
    if (!context.modules.count(module)) return misuse(INVALID_HANDLE, "cuModuleGetFunction of no module");
    const char *kinds = apr_emulation_kinds(name);
    if (!module->kernels.count(name) || !kinds) return NOT_FOUND;
    Function *&function = module->functions[name];
    if (!function) function = new Function{name, kinds};
    *out = function;
    return SUCCESS;
}

Result cuModuleUnload(Module *module) {
    Call call("cuModuleUnload", true);
    if (call.result != SUCCESS) return call.result;
    if (!context.modules.erase(module)) return misuse(INVALID_HANDLE, "cuModuleUnload of no module");
    for (auto &f : module->functions) delete f.second;
    delete module;
    return SUCCESS;
}

Result cuStreamCreate(Stream **out, unsigned) {
    Call call("cuStreamCreate");
    if (call.result != SUCCESS) return call.result;
    context.streams.insert(*out = new Stream());
    return SUCCESS;
}

Result cuStreamDestroy_v2(Stream *stream) {
    Call call("cuStreamDestroy", true);
    if (call.result != SUCCESS) return call.result;
    if (!context.streams.count(stream)) return misuse(INVALID_HANDLE, "cuStreamDestroy of no stream");
    if (!stream->queue.empty()) return misuse(INVALID_HANDLE, "cuStreamDestroy of one with work left");
    context.streams.erase(stream);
    delete stream;
    return SUCCESS;
}

Result cuStreamSynchronize(Stream *stream) {
    Call call("cuStreamSynchronize", true);
    if (call.result != SUCCESS) return call.result;
    return context.streams.count(stream) ? finish(stream) : misuse(INVALID_HANDLE, "cuStreamSynchronize of no stream");
}

Result cuLaunchKernel(Function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads_x,
                      unsigned threads_y, unsigned threads_z, unsigned shared_bytes, Stream *stream, void **args, void **extra) {
    Call call("cuLaunchKernel");
    if (call.result != SUCCESS) return call.result;
    if (!context.streams.count(stream)) return misuse(INVALID_HANDLE, "cuLaunchKernel on no stream");
    const bool is_grid = grid_x && grid_y && grid_z && grid_x <= INT32_MAX && grid_y <= 65535 && grid_z <= 65535;
    if (!is_grid || !threads_x || threads_x > 1024 || threads_y != 1 || threads_z != 1 || shared_bytes || extra)
        return misuse(INVALID_VALUE, "cuLaunchKernel of " + function->name + " over " + std::to_string(grid_x) + " by " +
                                         std::to_string(grid_y) + " by " + std::to_string(grid_z) + " blocks of " +
                                         std::to_string(threads_x));
    Work work = {};
    work.function = function;
    work.grid[0] = grid_x, work.grid[1] = grid_y, work.grid[2] = grid_z, work.threads = threads_x;
    for (size_t i = 0; i < function->kinds.size(); i++) {
        uint64_t word = 0;
        memcpy(&word, args[i], function->kinds[i] == 'p' ? 8 : 4);
        work.args.push_back(word);
    }
    (stream->capture ? stream->capture->launches : stream->queue).push_back(work);
    return SUCCESS;
}

Result cuStreamBeginCapture_v2(Stream *stream, int mode) {
    const int THREAD_LOCAL = 1;
    Call call("cuStreamBeginCapture", true);
    if (call.result != SUCCESS) return call.result;
    if (!context.streams.count(stream) || mode != THREAD_LOCAL) return misuse(INVALID_VALUE, "cuStreamBeginCapture of no stream or mode");
    stream->capture = new Graph();
    stream->is_invalidated = false;
    return SUCCESS;
}

Result cuStreamEndCapture(Stream *stream, Graph **out) {
    Call call("cuStreamEndCapture");
    if (call.result != SUCCESS) return call.result;
    if (!context.streams.count(stream) || !stream->capture) return misuse(INVALID_VALUE, "cuStreamEndCapture where nothing is recorded");
    Graph *graph = stream->capture;
    stream->capture = nullptr;
    if (stream->is_invalidated) return delete graph, *out = nullptr, STREAM_CAPTURE_INVALIDATED;
    context.graphs.insert(*out = graph);
    return SUCCESS;
}

Result cuGraphInstantiateWithFlags(Graph **out, Graph *graph, unsigned long long flags) {
    Call call("cuGraphInstantiate");
    if (call.result != SUCCESS) return call.result;
    if (!context.graphs.count(graph) || flags) return misuse(INVALID_VALUE, "cuGraphInstantiate of no graph");
    context.execs.insert(*out = new Graph(*graph));
    return SUCCESS;
}

Result cuGraphLaunch(Graph *exec, Stream *stream) {
    Call call("cuGraphLaunch", true);
    if (call.result != SUCCESS) return call.result;
    if (!context.execs.count(exec) || !context.streams.count(stream)) return misuse(INVALID_HANDLE, "cuGraphLaunch of no graph");
    stream->queue.insert(stream->queue.end(), exec->launches.begin(), exec->launches.end());
    context.in_flight.insert(exec);
    return SUCCESS;
}

Result cuGraphExecDestroy(Graph *exec) {
    Call call("cuGraphExecDestroy");
    if (call.result != SUCCESS) return call.result;
    if (context.in_flight.count(exec)) return misuse(INVALID_HANDLE, "cuGraphExecDestroy of one that may still run");
    if (!context.execs.erase(exec)) return misuse(INVALID_HANDLE, "cuGraphExecDestroy of no graph");
    delete exec;
    return SUCCESS;
}

Result cuGraphDestroy(Graph *graph) {
    Call call("cuGraphDestroy");
    if (call.result != SUCCESS) return call.result;
    if (!context.graphs.erase(graph)) return misuse(INVALID_HANDLE, "cuGraphDestroy of no graph");
    delete graph;
    return SUCCESS;
}

} // extern "C"
