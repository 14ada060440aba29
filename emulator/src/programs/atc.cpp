// The command `atc`, all of which is in the library.
extern "C" int cann_emulator_atc(int count, char** arguments);

int main(int count, char** arguments) { return cann_emulator_atc(count, arguments); }
