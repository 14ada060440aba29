// The emulator is not linked to Python, which may not be there: its functions are looked up in the process.
#include "races/call_site.h"

#include <dlfcn.h>

#include <string_view>

namespace cann::races {
namespace {

template <class Function>
Function* look_up(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

// The objects of Python are opaque here.
struct Python {
    int (*is_initialized)() = look_up<int()>("Py_IsInitialized");
    int (*is_finalizing)() = look_up<int()>("Py_IsFinalizing");
    int (*take_lock)() = look_up<int()>("PyGILState_Ensure");
    void (*give_lock)(int) = look_up<void(int)>("PyGILState_Release");
    void* (*this_thread)() = look_up<void*()>("PyGILState_GetThisThreadState");
    void* (*frame)() = look_up<void*()>("PyEval_GetFrame");  // borrowed, unlike the others
    void* (*caller)(void*) = look_up<void*(void*)>("PyFrame_GetBack");
    void* (*code)(void*) = look_up<void*(void*)>("PyFrame_GetCode");
    int (*line)(void*) = look_up<int(void*)>("PyFrame_GetLineNumber");
    void* (*attribute)(void*, const char*) = look_up<void*(void*, const char*)>("PyObject_GetAttrString");
    const char* (*text)(void*) = look_up<const char*(void*)>("PyUnicode_AsUTF8");
    void (*retain)(void*) = look_up<void(void*)>("Py_IncRef");
    void (*release)(void*) = look_up<void(void*)>("Py_DecRef");

    Python() {
        if (is_finalizing == nullptr) is_finalizing = look_up<int()>("_Py_IsFinalizing");  // before Python 3.13
    }

    bool runs() const { return is_initialized != nullptr && is_initialized() && !is_finalizing(); }
};

const Python& python() {
    static const Python found;
    return found;
}

std::string file_of(void* frame) {
    void* code = python().code(frame);
    void* name = python().attribute(code, "co_filename");
    const char* text = name == nullptr ? nullptr : python().text(name);
    const std::string file = text == nullptr ? "" : text;
    python().release(name);
    python().release(code);
    return file;
}

bool is_of_torch(std::string_view file) {
    for (const char* part : {"/torch/", "/torch_npu/", "<frozen "}) {
        if (file.find(part) != std::string_view::npos) return true;
    }
    return false;
}

// With Python's lock.
std::string find_call_site() {
    std::string innermost;
    void* frame = python().frame();
    python().retain(frame);
    while (frame != nullptr) {
        const std::string file = file_of(frame);
        const std::string site = file + ":" + std::to_string(python().line(frame));
        if (innermost.empty()) innermost = site;
        void* caller = python().caller(frame);
        python().release(frame);
        frame = caller;
        if (is_of_torch(file)) continue;
        python().release(frame);
        return site;
    }
    return innermost;
}

}  // namespace

std::string call_site() {
    if (!python().runs() || python().this_thread() == nullptr) return "";
    const int state = python().take_lock();
    const std::string site = find_call_site();
    python().give_lock(state);
    return site;
}

bool is_thread_of_program() { return !python().runs() || python().this_thread() != nullptr; }

}  // namespace cann::races
