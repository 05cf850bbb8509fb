// Renders conversations by templates as Ollama does: Go's text/template over messages of which those of one role that
// follow each other are one, and the system messages are put together as well.
//
// In: JSON, a list of {"template": text, "messages": [{"role": text, "content": text}]}.
// Out: JSON, a list of {"text": text} or {"error": text}.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type job struct {
	Template string    `json:"template"`
	Messages []message `json:"messages"`
}

type result struct {
	Text  string `json:"text"`
	Error string `json:"error,omitempty"`
}

const between = "\n\n"

func joined(messages []message) (string, []*message) {
	var system []string
	var turns []*message
	for _, next := range messages {
		next := next
		if next.Role == "system" {
			system = append(system, next.Content)
		}
		if count := len(turns); count > 0 && turns[count-1].Role == next.Role {
			turns[count-1].Content += between + next.Content
			continue
		}
		turns = append(turns, &next)
	}
	return strings.Join(system, between), turns
}

func render(each job) (string, error) {
	parsed, err := template.New("").Option("missingkey=zero").Parse(each.Template)
	if err != nil {
		return "", err
	}
	system, turns := joined(each.Messages)
	var text strings.Builder
	err = parsed.Execute(&text, map[string]any{"System": system, "Messages": turns, "Response": ""})
	return text.String(), err
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	results := make([]result, len(jobs))
	for place, each := range jobs {
		text, err := render(each)
		results[place].Text = text
		if err != nil {
			results[place].Error = err.Error()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
