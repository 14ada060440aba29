// Who the machine says it is: chip name, CANN version, attributes of the release.
#include <cstdio>
#include <cstring>

#include "runtime/runtime.h"

using namespace cann;

CANN_API const char* aclrtGetSocName() { return chip().soc.c_str(); }

CANN_API aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
    *version = {};
    const std::string& text = chip().version;
    std::snprintf(version->version, sizeof version->version, "%s", text.c_str());
    std::sscanf(text.c_str(), "%63[^.].%63[^.].%63[^.].%63s", version->majorVersion, version->minorVersion,
                version->releaseVersion, version->patchVersion);
    return ACL_SUCCESS;
}

CANN_API aclError aclsysGetVersionStr(char*, char* version) {
    std::strcpy(version, chip().version.c_str());  // the interface passes no size; callers give 128 bytes
    return ACL_SUCCESS;
}

CANN_API aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
    switch (attribute) {
        case ACL_CANN_ATTR_INF_NAN: *value = chip().inf_nan; return ACL_SUCCESS;
        case ACL_CANN_ATTR_BF16: *value = chip().inf_nan; return ACL_SUCCESS;  // both came with the 910B generation
        case ACL_CANN_ATTR_JIT_COMPILE: *value = 1; return ACL_SUCCESS;
        default: return fail(ACL_ERROR_INVALID_PARAM, "CANN attribute %d is not known", static_cast<int>(attribute));
    }
}
