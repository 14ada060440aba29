// The command line of ATC.
#pragma once

#include <map>
#include <string>

#include "offline/build.h"

namespace cann::offline {

// The options by their names, without the dashes. Throws Refusal for what is no option.
class CommandLine {
public:
    CommandLine(int count, char** arguments);

    bool has(const std::string& name) const { return values_.count(name) != 0; }
    std::string text(const std::string& name, const std::string& otherwise = "") const;
    int64_t number(const std::string& name, int64_t otherwise) const;
    const std::string& whole() const { return whole_; }

private:
    void add(const std::string& name, const std::string& value);

    std::map<std::string, std::string> values_;
    std::string whole_;
};

// What --help shows of the options.
std::string help_of_options();

// The four things that it can do; they throw Refusal.
void convert(const CommandLine& line);      // --mode=0
void write_json(const CommandLine& line);   // --mode=1
void check_model(const CommandLine& line);  // --mode=3
void show_model(const CommandLine& line);   // --mode=6

void print_model(const std::string& path);
graph::Graph read_model(const std::string& path);

std::string quoted(const std::string& text);  // as JSON has it

// The checks of paths that several of them need.
std::string input_path(const CommandLine& line, const std::string& option);
void check_output_path(const std::string& path, const std::string& option);

}  // namespace cann::offline
