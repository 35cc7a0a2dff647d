// What the pages take from Sphinx and Jupyter Book 2 reads otherwise, or not at all.

// Sphinx's glossary has a term on a line and its definition indented below it, which Markdown reads as one paragraph.
const glossary = {
  name: "glossary",
  stage: "document",
  plugin: (_, utils) => (tree) => {
    for (const part of utils.selectAll("glossary", tree)) {
      const children = part.children.flatMap(({ children: [first, ...rest] }) => {
        const [, term, text] = first.value.match(/^(.*)\n([^]*)$/);
        return [
          { type: "definitionTerm", children: [{ type: "text", value: term }] },
          { type: "definitionDescription", children: [{ type: "text", value: text }, ...rest] },
        ];
      });
      part.children = [{ type: "definitionList", children }];
    }
  },
};

// autodoc imports the library; here the names of what it documents must do.
const evalRst = {
  name: "eval-rst",
  body: { type: String, required: true },
  run({ body }) {
    const names = [...body.matchAll(/^\.\. auto\w+:: (\S+)/gm)].map(([, name]) => name);
    return names.map((name) => ({ type: "paragraph", children: [{ type: "inlineCode", value: name }] }));
  },
};

const plugin = { name: "Forms of Sphinx", directives: [evalRst], transforms: [glossary] };
export default plugin;
